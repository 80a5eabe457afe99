# SPDX-License-Identifier: Apache-2.0
"""O in fp16, of the sm90 kernels' int8_fp8: what keeps it from overflowing, and its error."""

import math
import re
from pathlib import Path

import pytest
import torch

from sagert import half_output, recipes, reference
from sagert.exact import exact_attention

KERNELS = Path(__file__).parents[3] / "kernels/sm90"
P_MAX = 112.0
BLOCK = 128


def channels(kind: str, keys: int) -> torch.Tensor:
    """V [1, keys, 8]."""
    v = torch.randn(1, keys, 8, generator=torch.Generator().manual_seed(3))
    if kind == "outlier":
        v[:, keys // 2] *= 1000.0
    elif kind == "loud":
        v[:, :: max(1, keys // 8)] *= 20.0
    elif kind == "equal":
        v = torch.ones_like(v)
    elif kind == "halves":
        v = torch.where(torch.arange(keys)[None, :, None] < keys // 2, 1.0, -1.0).expand_as(v).contiguous()
    elif kind == "biased":
        v += 0.4
    elif kind == "block":
        v[:, :BLOCK], v[:, BLOCK:] = 1.0, 0.0
    return v


KINDS = ("normal", "outlier", "loud", "equal", "halves", "biased", "block")


def test_nothing_overflows():
    largest = recipes.FP8_MAX_WGMMA
    assert 2.0 ** recipes.recipe_of("int8_fp8", family="wgmma").log2_p[0] == pytest.approx(P_MAX)
    assert largest * (half_output.LARGEST_SUM + BLOCK * P_MAX) < 65504.0


@pytest.mark.parametrize("kind", KINDS)
def test_flat_attention_over_many_blocks(kind):
    keys = 6_000  # every row's sum of P goes beyond the limit
    v = channels(kind, keys)[None].half()
    q, k = torch.zeros(1, 1, 2, 64).half(), torch.randn(1, 1, keys, 64).half()
    want, _ = exact_attention(q, k, v)
    out, lse = reference.attention(q, k, v, precision="int8_fp8", family="wgmma")
    assert (out.double() - want).abs().max() <= 2e-3 * v.abs().max()
    assert lse.sub(math.log(keys)).abs().max() <= 1e-3


def test_constants_are_the_kernels():
    text = (KERNELS / "half_output.cuh").read_text()

    def constant(name: str) -> float:
        return float(re.search(rf"constexpr \w+ {name} = ([\d.]+)f?;", text)[1])

    assert constant("kLargestSum") == half_output.LARGEST_SUM
    assert constant("kFirstBlocks") == half_output.FIRST_BLOCKS
    assert constant("kSumSteps") == half_output.SUM_STEPS
    assert constant("kSettleBlocks") == half_output.SETTLE_BLOCKS
    assert constant("kLargestFirstSum") == half_output.LARGEST_FIRST_SUM
    assert f"kLargestV = {recipes.FP8_MAX_WGMMA}f;" in (KERNELS / "prepass.cu").read_text()
