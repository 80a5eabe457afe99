# SPDX-License-Identifier: Apache-2.0
"""Exponentials of the wgmma family's int8_fp8, which computes some of them in fp16 by a cubic."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, HALVING_STEP = 128, 192
# kernels/sm90/exponential.cuh, of kernels for that many channels and keys at a time: bit 2 j + r of the pattern stands
# for keys 8 j .. 8 j + 7 of a block of 128 and for rows 8 r .. 8 r + 7 of each 16. Where steps of keys are a block and
# a half, the middle one of three blocks is halved, and has none of them.
_PATTERNS = {(64, BLOCK): 0x30043004, (64, HALVING_STEP): 0x48103004, (128, BLOCK): 0x48404840}
_HALF_BIAS = 15.0
# Of a cubic near 2^(m - 1) on [1, 2], in fp16.
_COEFFICIENTS = (0.077880859375, -0.00803375244140625, 0.478759765625, 0.451171875)


def _half(x: Tensor) -> Tensor:
    """Rounded to fp16; held in fp64, which is exact for sums and products of two such numbers."""
    return x.to(torch.float16).double()


def exp2_half(x: Tensor) -> Tensor:
    """2^x in fp16, x fp32 below 16: the exponent with 10 bits behind the point as an fp16 number's bits, its mantissa
    replaced by a cubic in it. 0 from -15 down; relative error .1 % above -14."""
    biased = (x.nan_to_num(nan=-_HALF_BIAS) + _HALF_BIAS).clamp(0.0, 31.99)
    bits = torch.round(biased * 1024.0).to(torch.int32)
    m = 1.0 + (bits & 1023).double() / 1024.0
    power = torch.full_like(m, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        power = _half(power * m + coefficient)
    mantissas = (power.to(torch.float16).view(torch.int16) - m.to(torch.float16).view(torch.int16)).to(torch.int32)
    return (bits + mantissas).to(torch.int16).view(torch.float16).float()


def is_half(position: Tensor, keys: range, head_dim: int, step: int = BLOCK) -> Tensor:
    """Which exponentials are computed in fp16: bool [rows, keys], for queries at `position` and keys of a head.

    step: keys that softmax takes at a time.
    """
    pattern = _PATTERNS[64 if head_dim <= 64 else 128, step]
    table = torch.tensor([pattern >> bit & 1 for bit in range(32)], dtype=torch.bool, device=position.device)
    places = torch.arange(keys.start, keys.stop, device=position.device)
    halved = (places // BLOCK % 3 == 1) & (step == HALVING_STEP)
    return table[2 * (places % BLOCK // 8)[None, :] + (position % 16 // 8)[:, None]] & ~halved
