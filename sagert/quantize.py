# SPDX-License-Identifier: Apache-2.0
"""Quantizers of the reference, bit for bit those of the portable kernels. All take and return fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-30  # below this a row or channel counts as zero: 127 / amax must stay finite
NEVER = 2**31 - 1  # key index that no query reaches


def k_shift(k: Tensor) -> Tensor:
    """Mean over keys of the finite entries of k [N, Sk, D], others counting as 0: [N, 1, D]."""
    shift = torch.where(k.isfinite(), k, 0.0).sum(1, keepdim=True) / k.shape[1]
    return torch.where(shift.isfinite(), shift, 0.0)


def quantize_rows(x: Tensor, inf_scale: float) -> tuple[Tensor, Tensor]:
    """INT8 values of x [..., D], held in fp32, and one scale per row [..., 1].

    x is close to values * scale; rounding is half to even. A row without NaN that holds infinities becomes +-127 at
    them with scale `inf_scale`; a row with a NaN becomes zeros with scale NaN.
    """
    finite = x.isfinite()
    bad = ~finite.all(-1, keepdim=True)
    nan = x.isnan().any(-1, keepdim=True)
    clean = torch.where(finite, x, 0.0)
    amax = clean.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    zero = amax < TINY
    inverse = torch.where(zero, 0.0, 127.0 / torch.where(zero, 1.0, amax))
    values = torch.round(clean * inverse)
    at_infinities = torch.where(finite, 0.0, 127.0 * torch.sign(torch.where(nan, 0.0, x)))
    values = torch.where(bad, torch.where(nan, 0.0, at_infinities), values)
    scale = torch.where(zero, 1.0, amax * torch.tensor(1.0 / 127.0, dtype=torch.float32))
    scale = torch.where(bad, torch.where(nan, math.nan, inf_scale), scale)
    return values, scale


def quantize_v_fp8(v: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values of v [N, Sk, Dv], held in fp32 with non-finite entries as 0, and one scale per channel [N, 1, Dv]."""
    clean = torch.where(v.isfinite(), v, 0.0)
    amax = clean.abs().amax(1, keepdim=True)
    zero = amax < TINY
    inverse = torch.where(zero, 0.0, 448.0 / torch.where(zero, 1.0, amax))
    values = (clean * inverse).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
    return values, torch.where(zero, 1.0, amax * torch.tensor(1.0 / 448.0, dtype=torch.float32))


def first_nonfinite(v: Tensor) -> tuple[Tensor, Tensor]:
    """First key whose entry of v [N, Sk, Dv] is +inf or NaN, and first that is -inf or NaN: int64 [N, 1, Dv] each."""
    keys = torch.arange(v.shape[1], device=v.device)[None, :, None]
    nan = v.isnan()
    positive = torch.where(nan | (v == math.inf), keys, NEVER).amin(1, keepdim=True)
    negative = torch.where(nan | (v == -math.inf), keys, NEVER).amin(1, keepdim=True)
    return positive, negative
