# SPDX-License-Identifier: Apache-2.0
"""Exponentials of the wgmma family's int8_fp8, which computes some of them in fp16 by a polynomial."""

from __future__ import annotations

import torch
from torch import Tensor

# kernels/sm90/exponential.cuh: bit 2 j + r of the pattern stands for keys 8 j .. 8 j + 7 of a block of 128 and for rows
# 8 r .. 8 r + 7 of each 16.
_PATTERNS = {64: 0x48A448A4, 128: 0x48484848}
_HALF_BIAS = 15.0
_COEFFICIENTS = (0.23388671875, -0.6943359375, 1.45703125)  # of a quadratic near 2^(m - 1) / m on [1, 2], in fp16


def _half(x: Tensor) -> Tensor:
    """Rounded to fp16; held in fp64, which is exact for sums and products of two such numbers."""
    return x.to(torch.float16).double()


def exp2_half(x: Tensor) -> Tensor:
    """2^x in fp16, x fp32 below 16: the exponent with 10 bits behind the point as an fp16 number's bits, corrected by
    a quadratic in its mantissa. 0 from -15 down; relative error .4 % above -14."""
    bits = torch.round((x.nan_to_num(nan=-_HALF_BIAS) + _HALF_BIAS).clamp(0.0, 31.99) * 1024.0).to(torch.int32)
    linear = bits.to(torch.int16).view(torch.float16).double()
    mantissa = 1.0 + (bits & 1023).double() / 1024.0
    second, first, constant = _COEFFICIENTS
    ratio = _half(_half(second * mantissa + first) * mantissa + constant)
    return _half(linear * ratio).float()


def is_half(position: Tensor, keys: range, head_dim: int) -> Tensor:
    """Which exponentials are computed in fp16: bool [rows, keys], for queries at `position` and keys of a head."""
    pattern = _PATTERNS[64 if head_dim <= 64 else 128]
    table = torch.tensor([pattern >> bit & 1 for bit in range(32)], dtype=torch.bool, device=position.device)
    tiles = torch.arange(keys.start, keys.stop, device=position.device) % 128 // 8
    return table[2 * tiles[None, :] + (position % 16 // 8)[:, None]]
