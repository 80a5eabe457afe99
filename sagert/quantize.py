# SPDX-License-Identifier: Apache-2.0
"""Quantizers of the reference, bit for bit those of the kernels. All take and return fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of V in the portable int8_int8: keys that share a scale, and the largest value; codes beyond mark what is not finite.
V_BLOCK, V_MAX = 64, 126.0
K_SAMPLE = 512  # keys, at least, that a sample has
STORED_CHANNELS = (64, 128, 256)  # of a head: the pre-passes of tiled families pad with zeros
EVEN_SPREAD = 2.5  # of the channels of an even block of V: the largest scale beside their root mean square
V_GROUPS, GROUP_SPREAD = 4, 1.6  # of channels that share scales in an even block of V, and the same of a group's pairs
NOTHING = 1e-20  # below this a pair of channels counts as zero beside its units
SINK_KEYS, SINK_LOUDNESS = 4, 0.5  # of V's first keys, if none is a sink: its largest value beside the first block's
TINY = 1e-30  # below this a row or channel counts as zero: 127 / amax must stay finite


def sampled_keys(length: int) -> Tensor:
    """Indices of the keys whose mean stands for the mean of `length` keys: all below 1024, then one of each stride.

    Where in its stride each lies is a hash of its number, so that no period of the keys meets theirs.
    """
    stride = max(length // K_SAMPLE, 1)
    i = torch.arange(length // stride)
    word = 0xFFFFFFFF
    x = i * 0x9E3779B1 & word
    x = (x ^ x >> 15) * 0x85EBCA6B & word
    return i * stride + ((x ^ x >> 13) * stride >> 32)


def k_shift(k: Tensor) -> Tensor:
    """Mean over keys of the finite entries of k [N, Sk, D], others counting as 0: [N, 1, D]."""
    shift = torch.where(k.isfinite(), k, 0.0).sum(1, keepdim=True) / k.shape[1]
    return torch.where(shift.isfinite(), shift, 0.0)


def quantize_rows(x: Tensor, inf_scale: float, largest: float = 127.0) -> tuple[Tensor, Tensor]:
    """Integers up to `largest` for x [..., D], held in fp32, and one scale per row [..., 1].

    x is close to values * scale; rounding is half to even. A row without NaN that holds infinities becomes +-`largest`
    at them with scale `inf_scale`; a row with a NaN becomes zeros with scale NaN.
    """
    finite = x.isfinite()
    bad = ~finite.all(-1, keepdim=True)
    nan = x.isnan().any(-1, keepdim=True)
    clean = torch.where(finite, x, 0.0)
    amax = clean.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    zero = amax < TINY
    inverse = torch.where(zero, 0.0, largest / torch.where(zero, 1.0, amax))
    values = torch.round(clean * inverse)
    at_infinities = torch.where(finite, 0.0, largest * torch.sign(torch.where(nan, 0.0, x)))
    values = torch.where(bad, torch.where(nan, 0.0, at_infinities), values)
    scale = torch.where(zero, 1.0, amax * torch.tensor(1.0 / largest, dtype=torch.float32))
    scale = torch.where(bad, torch.where(nan, math.nan, inf_scale), scale)
    return values, scale


def q_means(q: Tensor) -> Tensor:
    """What INT4 takes off each query of q [..., S, D], fp16 or bf16: the mean of its block, fp32 of q's shape.

    Blocks have 128 queries, or as many times 2 as leave 32 of them where D is at most 64, else 64. Entries that are not
    finite count as 0; the mean is rounded to q's type.
    """
    length, d = q.shape[-2:]
    block = 128
    while -(-length // block) > (32 if d <= 64 else 64):
        block *= 2
    clean = torch.where(q.isfinite(), q, 0.0).float()
    blocks = torch.nn.functional.pad(clean, (0, 0, 0, -length % block)).reshape(*q.shape[:-2], -1, block, d)
    count = (length - torch.arange(0, blocks.shape[-3] * block, block, device=q.device)).clamp(max=block)
    mean = (blocks.sum(-2, keepdim=True) / count[:, None, None]).to(q.dtype).float()
    return mean.expand(blocks.shape).reshape(*q.shape[:-2], -1, d)[..., :length, :]


def quantize_key_groups(k: Tensor, block: int = 128, largest: float = 127.0) -> tuple[Tensor, Tensor]:
    """Integers up to `largest` for finite k [N, Sk, D], held in fp32, and the scale of each key's group [N, Sk, 1].

    A group is the quarter of a block's keys that one lane of the tensor core's fragment holds: (key % 8) // 2 is equal.
    """
    n, keys, d = k.shape
    padded = torch.nn.functional.pad(k, (0, 0, 0, -keys % block))
    groups = padded.reshape(n, -1, block // 8, 4, 2, d)
    amax = groups.abs().amax((2, 4, 5), keepdim=True)
    zero = amax < TINY
    inverse = torch.where(zero, 0.0, largest / torch.where(zero, 1.0, amax))
    scale = torch.where(zero, 1.0, amax * torch.tensor(1.0 / largest, dtype=torch.float32))
    values = torch.round(groups * inverse).reshape(n, -1, d)[:, :keys]
    return values, scale.expand(*groups.shape[:-1], 1).reshape(n, -1, 1)[:, :keys]


def v_mean(v: Tensor) -> Tensor:
    """Mean over keys of the channels of v [N, Sk, Dv] where it is at least half their deviation, else 0: [N, 1, Dv]."""
    clean = torch.where(v.isfinite(), v, 0.0)
    mean = clean.mean(1, keepdim=True)
    variance = clean.square().mean(1, keepdim=True) - mean.square()
    return torch.where(mean.square() >= 0.25 * variance, mean, 0.0)


def v_largest(v: Tensor) -> Tensor:
    """e4m3's largest value less the power of two that leaves channels of v [N, Sk, Dv] a root mean square of 1 to 2.

    [N, 1, Dv]: what the wgmma family scales their largest magnitudes to, for sums in fp16 (kernels/sm90/prepass.cu).
    """
    clean = torch.where(v.isfinite(), v, 0.0)
    ratio = clean.abs().amax(1, keepdim=True) / (224.0 * clean.square().mean(1, keepdim=True).sqrt())
    power = torch.exp2(torch.frexp(ratio.nan_to_num(nan=0.0).clamp(2.0**-8, 1.0)).exponent - 1.0)
    return 448.0 * power


def quantize_v_fp8(v: Tensor, largest: float | Tensor = 448.0) -> tuple[Tensor, Tensor]:
    """e4m3 values up to `largest` of v [N, Sk, Dv], held in fp32, non-finite entries as 0; scales [N, 1, Dv].

    largest: of all channels, or [N, 1, Dv].
    """
    clean = torch.where(v.isfinite(), v, 0.0)
    amax = clean.abs().amax(1, keepdim=True)
    zero = amax < TINY
    most = torch.as_tensor(largest, dtype=torch.float32, device=v.device)
    inverse = torch.where(zero, 0.0, most / torch.where(zero, 1.0, amax))
    values = (clean * inverse).clamp(-most, most).to(torch.float8_e4m3fn).float()
    return values, torch.where(zero, 1.0, amax * (1.0 / most))


def quantize_v_half(v: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 values up to 1 of v [N, Sk, Dv], held in fp32, non-finite entries as 0; scales [N, 1, Dv], powers of two."""
    clean = torch.where(v.isfinite(), v, 0.0)
    amax = clean.abs().amax(1, keepdim=True)
    above = (amax.view(torch.int32) + 0x7FFFFF).clamp(max=0x7EFFFFFF) & -0x800000
    scale = torch.where(amax < TINY, 1.0, above.view(torch.float32))
    return (clean / scale).to(torch.float16).float(), scale


def quantize_v_int8(
    v: Tensor, block: int = 128, largest: float = 127.0, short_scales: bool = True
) -> tuple[Tensor, Tensor]:
    """INT8 values of v [N, Sk, Dv], held in fp32 with non-finite entries as 0, and scales [N, blocks of keys, Dv].

    Values reach up to `largest`. Short scales are bf16 numbers, rounded up so that no value exceeds it.
    """
    n, keys, d = v.shape
    clean = torch.nn.functional.pad(torch.where(v.isfinite(), v, 0.0), (0, 0, 0, -keys % block))
    blocks = clean.reshape(n, -1, block, d)
    amax = blocks.abs().amax(2, keepdim=True)
    zero = amax < TINY
    scale = torch.where(zero, 1.0, amax * torch.tensor(1.0 / largest, dtype=torch.float32))
    if short_scales:
        scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
        inverse = 1.0 / scale
    else:
        inverse = largest / torch.where(zero, 1.0, amax)
    values = torch.where(zero, 0.0, torch.round(blocks * inverse))
    return values.reshape(n, -1, d)[:, :keys], scale[:, :, 0]


def v_units(v: Tensor) -> Tensor:
    """Units of the channels of v [N, Sk, Dv], less its mean: root mean squares over all keys, [N, 1, Dv]."""
    return torch.where(v.isfinite(), v, 0.0).square().mean(1, keepdim=True).sqrt().clamp(1e-10, 1e18)


def quantize_v_int8_groups(v: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """As quantize_v_int8, of v in units of its channels, a quarter of which share scales: kernels/sm90/prepass.cu.

    In a block where the largest scale of such a group would exceed GROUP_SPREAD times the root mean square of those of
    its pairs of channels, 2 i and 2 i + 1, only the pairs share scales.
    """
    n, keys, d = v.shape
    stored = next(channels for channels in STORED_CHANNELS if channels >= d)
    clean = torch.where(v.isfinite(), v, 0.0)
    blocks = torch.nn.functional.pad(clean, (0, stored - d, 0, -keys % block)).reshape(n, -1, block, stored)
    groups = blocks.abs().amax(2).reshape(n, -1, V_GROUPS, stored // V_GROUPS // 2, 2).amax(-1)
    most = groups.amax(-1, keepdim=True)
    parts = torch.where(groups < NOTHING, 1.0, groups / most.clamp(min=NOTHING))
    even = (parts.square().sum(-1) * GROUP_SPREAD**2 >= groups.shape[-1]).all(-1)
    largest = torch.where(even[:, :, None, None], most, groups).flatten(2).repeat_interleave(2, 2)[:, :, None]
    zero = largest < NOTHING
    scale = torch.where(zero, 1.0, largest * torch.tensor(1.0 / 127.0, dtype=torch.float32))
    scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    values = torch.where(zero, 0.0, torch.round(blocks / scale))
    return values.reshape(n, -1, stored)[:, :keys, :d], scale[:, :, 0, :d]


def quantize_v_int8_even(v: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """As quantize_v_int8, but with one factor for all channels of a block where that does: kernels/sm80/blocks.cuh.

    Scales are in units of the channels, their root mean squares over all keys, v being without its mean. The factor
    does where it is at most EVEN_SPREAD times the root mean square of the channels' scales, but not in a first block
    where one of the first keys may be an attention sink.
    """
    n, keys, d = v.shape
    clean = torch.where(v.isfinite(), v, 0.0)
    unit = v_units(v)
    in_units = clean / unit
    values, scale = quantize_v_int8(in_units, block)
    stored = next(channels for channels in STORED_CHANNELS if channels >= d)
    blocks = torch.nn.functional.pad(clean, (0, 0, 0, -keys % block)).reshape(n, -1, block, d)
    ratio = blocks.abs().amax(2) / unit
    largest = ratio.amax(-1, keepdim=True)
    even = (largest > 0.0) & ((ratio / largest).square().sum(-1, keepdim=True) * EVEN_SPREAD**2 >= stored)
    quietest = in_units[:, :SINK_KEYS].abs().amax(-1).amin(-1)
    even[:, 0] &= quietest[:, None] >= SINK_LOUDNESS * largest[:, 0]
    factor = torch.where(even, largest * torch.tensor(1.0 / 127.0, dtype=torch.float32), 1.0) * unit
    shared = torch.round(blocks / factor[:, :, None]).clamp(-127.0, 127.0).reshape(n, -1, d)[:, :keys]
    by_key = even.repeat_interleave(block, 1)[:, :keys]
    return torch.where(by_key, shared, values), torch.where(even, factor, scale * unit)


def encode_v_int8(values: Tensor, v: Tensor) -> Tensor:
    """`values` (of quantize_v_int8, up to 126) as int8: 127 where v is +inf, -127 where it is -inf, -128 for NaN."""
    marked = torch.where(v == math.inf, 127.0, torch.where(v == -math.inf, -127.0, values))
    return torch.where(v.isnan(), -128.0, marked).to(torch.int8)


def decode_v_int8(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What encode_v_int8 stored: fp32 values with 0 for non-finite entries, and where V is +inf or NaN, -inf or NaN."""
    nan = codes == -128
    positive, negative = nan | (codes == 127), nan | (codes == -127)
    return torch.where(positive | negative, 0.0, codes.float()), positive, negative


def encode_v_fp8(values: Tensor, v: Tensor) -> Tensor:
    """e4m3 bytes of `values` (of quantize_v_fp8) with v's non-finite entries in codes no value takes: uint8, v's shape.

    A value of -0 is stored as +0, which leaves 0x80 free for NaN; 0x7f is +inf and 0xff -inf.
    """
    codes = (values + 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    for code, entries in ((0x7F, v == math.inf), (0xFF, v == -math.inf), (0x80, v.isnan())):
        codes = torch.where(entries, torch.full_like(codes, code), codes)
    return codes


def decode_v_fp8(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What encode_v_fp8 stored: fp32 values with 0 for non-finite entries, and where V is +inf or NaN, -inf or NaN."""
    nan = codes == 0x80
    positive, negative = nan | (codes == 0x7F), nan | (codes == 0xFF)
    values = codes.view(torch.float8_e4m3fn).float()
    return torch.where(positive | negative, 0.0, values), positive, negative
