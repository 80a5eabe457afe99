# SPDX-License-Identifier: Apache-2.0
"""O in fp16, of the sm90 kernels' int8_fp8: its range, its error, and what is summed in fp32 instead."""

import math
import re
from pathlib import Path

import pytest
import torch

from sagert import exponential, half_output, quantize, recipes, reference
from sagert.exact import exact_attention
from tests.gpu.value_kinds import KINDS, make_kind

KERNELS = Path(__file__).parents[3] / "kernels/sm90"


def channels(kind: str, keys: int) -> torch.Tensor:
    """V [1, keys, 8]."""
    return make_kind(kind, torch.randn(1, keys, 8, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("keys", [1, 100, 1024, 20_000])
@pytest.mark.parametrize("kind", KINDS)
def test_root_mean_square_of_v(kind, keys):
    v = channels(kind, keys)
    centred = v - quantize.v_mean(v)
    largest = quantize.v_largest(centred)
    values, scale = quantize.quantize_v_fp8(centred, largest)
    power = torch.log2(448.0 / largest)
    assert torch.equal(power, power.round())
    rms = values.square().mean(1, keepdim=True).sqrt()
    inside = (largest < 448.0) & (rms > 0)
    assert ((rms[inside] > 0.95) & (rms[inside] < 2.05)).all()
    assert values.abs().max() <= 448.0
    assert (values * scale - centred).abs().max() <= centred.abs().max() / 16


def test_the_largest_value_of_an_outlier_is_e4m3s():
    v = torch.zeros(1, 100_000, 1)
    v[0, 7] = 1.0
    assert quantize.v_largest(v).item() == 448.0
    assert quantize.v_largest(torch.zeros(1, 10, 1)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_flat_attention_over_many_blocks(kind):
    keys = 6_000  # every row's sum of P goes beyond the limit
    v = channels(kind, keys)[None].half()
    q, k = torch.zeros(1, 1, 2, 64).half(), torch.randn(1, 1, keys, 64).half()
    want, _ = exact_attention(q, k, v)
    out, lse = reference.attention(q, k, v, precision="int8_fp8", family="wgmma")
    assert (out.double() - want).abs().max() <= 4e-3 * v.abs().max()
    assert lse.sub(math.log(keys)).abs().max() <= 1e-3


def test_overflow_is_seen_and_summed_in_fp32():
    half = half_output.HalfOutput(torch.zeros(1, 2, 4))
    p, v = torch.tensor([[[448.0] * 128, [1.0] * 128]]), torch.ones(1, 128, 4) * 2.0
    half.add(torch.ones(1, 2, 1), p, v, torch.ones(1, 2, 1, dtype=torch.bool))
    assert half.overflown().flatten().tolist() == [True, False]
    # The same through attention: the first block that is visited overflows.
    values = channels("last", 6_000)[None].half()
    q, k = torch.zeros(1, 1, 2, 64).half(), torch.randn(1, 1, 6_000, 64).half()
    out, _ = reference.attention(q, k, values, precision="int8_fp8", family="wgmma")
    assert torch.allclose(out.double(), torch.full_like(out, 128 / 6_000).double(), rtol=2e-3)


def test_long_rows_are_summed_in_fp32():
    half = half_output.HalfOutput(torch.zeros(1, 1, 4))
    half.visited += half_output.LARGEST_KEYS // 128
    assert not half.overflown().any()
    half.visited += 1
    assert half.overflown().all()


def test_constants_are_the_kernels():
    text = "".join((KERNELS / name).read_text() for name in ("half_sums.cuh", "tile.cuh"))

    def constant(name: str) -> float:
        return float(re.search(rf"constexpr \w+ {name} = ([\d.]+)f?;", text)[1])

    assert constant("kLargestSum") == half_output.LARGEST_SUM
    assert constant("kSumExponent") == half_output.SUM_EXPONENT
    steps = [half_output.settle_steps(keys) for keys in (128, exponential.HALVING_STEP)]
    settle = re.search(r"kSettleSteps = kSide == 0 \? (\d+) : (\d+);", text)
    assert [int(number) for number in settle.groups()] == steps
    assert all(step % 8 == 0 for step in steps)
    assert int(re.search(r"kHalfSteps = \((\d+) \* kBlock", text)[1]) * 128 == half_output.LARGEST_KEYS
    consumer = (KERNELS / "consumer.cuh").read_text()
    less = float(re.search(r"kHalfAtMaximum = kAtMaximum - ([\d.]+)f;", consumer)[1])
    assert math.log2(448.0) - less == pytest.approx(half_output.LOG2_P)
    assert recipes.recipe_of("int8_fp8", family="wgmma").half_output
