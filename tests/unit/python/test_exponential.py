# SPDX-License-Identifier: Apache-2.0
"""The exponentials that the sm90 kernel computes in fp16, and which they are."""

import re
from pathlib import Path

import pytest
import torch

from sagert.exponential import HALVING_STEP, exp2_half, is_half

SOURCE = Path(__file__).parents[3] / "kernels/sm90/exponential.cuh"


def test_error_and_range():
    x = torch.linspace(-14.0, 15.0, 200_001)
    error = exp2_half(x).double() / torch.exp2(x.double()) - 1.0
    assert error.abs().max() <= 1.1e-3
    assert error.mean().abs() <= 1e-4
    assert error.std() <= 3.5e-4


def test_what_is_too_small_vanishes():
    low = torch.tensor([-15.0, -16.0, -1e4, -torch.inf, torch.nan])
    assert torch.equal(exp2_half(low), torch.zeros(5))
    assert 0.0 < exp2_half(torch.tensor([-14.5])).item() < 2.0**-14


def test_integers_are_exact():
    x = torch.arange(-14.0, 16.0)
    assert torch.equal(exp2_half(x), torch.exp2(x))


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_rows_share_the_polynomial_evenly(head_dim):
    where = is_half(torch.arange(64), range(128, 384), head_dim)
    assert where.shape == (64, 256)
    assert where.float().mean().item() == 6 / 32
    halves = where.view(4, 2, 8, 256).float().mean((0, 2, 3))
    assert abs(halves[0] - halves[1]) <= 2 / 16
    assert torch.equal(where[:, :128], where[:, 128:])


def test_steps_that_halve_blocks():
    """Three blocks are two steps of a whole block and half of the middle one, which MUFU computes alone."""
    whole, middle, last = is_half(torch.arange(16), range(384), 64, HALVING_STEP).split(128, 1)
    assert torch.equal(whole, last)
    assert whole.float().mean().item() == 6 / 32
    assert not middle.any()


def test_constants_are_the_kernels():
    text = SOURCE.read_text()
    steps, *blocks = re.search(
        r"kSide != 0 +\? (0x\w+?)u\s+: kHeadDim == 64 \? (0x\w+?)u\s+: (0x\w+?)u;", text
    ).groups()
    for (head_dim, step), pattern in zip(((64, HALVING_STEP), (64, 128), (128, 128)), (steps, *blocks), strict=True):
        where = is_half(torch.arange(16), range(128), head_dim, step)
        for pair in range(32):
            assert where[8 * (pair % 2), 8 * (pair // 2)].item() == bool(int(pattern, 16) >> pair & 1)
    from sagert import exponential

    halves = re.findall(r"0x([0-9a-f]{8})u", "".join(re.findall(r"half2_fma\(.*\)", text)))
    for coefficient, half in zip(exponential._COEFFICIENTS, halves, strict=True):
        bits = torch.tensor(coefficient, dtype=torch.float16).view(torch.int16).item() & 0xFFFF
        assert half == f"{bits:04x}" * 2
    assert float(re.search(r"kHalfBias = (\d+)\.f;", text)[1]) == exponential._HALF_BIAS
