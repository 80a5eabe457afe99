# SPDX-License-Identifier: Apache-2.0
"""The kernels' arithmetic in plain torch: what CPU tensors run on, and the oracle of the tests.

Same steps and same rounding as the kernels, in fp32, over the same key blocks; it differs from them by the order of
additions inside a matrix product and by the last bit of exp2. `sagert.exact` is float64 attention without any
quantization, which accuracy is measured against.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sagert.exact import error_metrics as error_metrics
from sagert.exact import exact_attention as exact_attention
from sagert.exponential import exp2_half, is_half
from sagert.quantize import (
    V_BLOCK,
    V_MAX,
    decode_v_fp8,
    decode_v_int8,
    encode_v_fp8,
    encode_v_int8,
    k_shift,
    quantize_key_groups,
    quantize_rows,
    quantize_v_fp8,
    quantize_v_int8,
    v_mean,
)
from sagert.visibility import Pattern, pattern, segments

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
LOG2_448 = math.log2(448.0)  # 448 is e4m3's largest value
# Tiled families move a row's maximum only when a score's exponent exceeds it by the slack: log2 of P at the maximum,
# and the slack. P in 16 bits is scaled to keep small weights out of fp16's subnormal numbers.
TILED_LOG2_P = {"int8_fp8": (LOG2_448, 2.0**-8), "int8_fp16": (8.0, 6.0), "int8_int8": (0.0, 0.0)}
PRECISIONS = ("int8_fp16", "int8_fp8", "int8_int8")
TILED = ("wgmma", "mma")  # families that scale K by groups of keys and take V's mean off; CPU tensors run on "portable"
CHUNK_ELEMENTS = 1 << 24  # scores held at a time: 64 MiB in fp32
BLOCKS = {"portable": 128, "wgmma": 128, "mma": 64}  # keys that share scales, or that softmax takes at a time


class Recipe(NamedTuple):
    """Whose arithmetic to follow."""

    precision: str
    smooth_k: bool = True
    family: str = "portable"
    block_n: int = BLOCKS["portable"]


class KeyValues(NamedTuple):
    """Quantized K and V of N key heads, values of integers and of e4m3 held in fp32."""

    k: Tensor  # [N, Sk, D]
    k_scale: Tensor  # [N, Sk, 1]
    k_shift: Tensor  # [N, 1, D]
    v: Tensor  # [N, Sk, Dv], non-finite entries as 0
    v_scale: Tensor  # [N, 1 or blocks, Dv]
    v_mean: Tensor | None  # [N, 1, Dv]
    positive: Tensor | None  # [N, Sk, Dv], where V is +inf or NaN; None where V is finite
    negative: Tensor | None  # [N, Sk, Dv], where V is -inf or NaN


def _recipe(precision: str, smooth_k: bool = True, family: str = "portable", block_n: int | None = None) -> Recipe:
    """A recipe that has a reference; ValueError for others. P in bytes fixes its blocks of keys."""
    if precision not in PRECISIONS or family not in BLOCKS:
        raise ValueError(f"{precision=} in {family=} has no reference: use one of {PRECISIONS} in {[*BLOCKS]}")
    blocks = BLOCKS | ({"portable": V_BLOCK} if precision == "int8_int8" else {})
    return Recipe(precision, smooth_k, family, blocks[family] if precision == "int8_int8" or not block_n else block_n)


def _with_marks(kv: KeyValues, positive: Tensor, negative: Tensor) -> KeyValues:
    """`kv` with V's non-finite entries, if there are any."""
    if positive.any() or negative.any():
        return kv._replace(positive=positive, negative=negative)
    return kv


def quantize_heads(k: Tensor, v: Tensor, recipe: Recipe) -> KeyValues:
    """Quantizes k [N, Sk, D] and v [N, Sk, Dv] of some key heads."""
    tiled = recipe.family in TILED
    kf, vf = k.float(), v.float()
    shift = k_shift(kf) if recipe.smooth_k else kf.new_zeros(kf.shape[0], 1, kf.shape[2])
    if tiled:
        k8, k_scale = quantize_key_groups(kf - shift, BLOCKS[recipe.family])
    else:
        k8, k_scale = quantize_rows(kf - shift, math.inf)
    nan = vf.isnan()
    positive, negative = nan | (vf == math.inf), nan | (vf == -math.inf)
    mean = v_mean(vf) if tiled and recipe.precision != "int8_fp16" else None
    if mean is not None:
        vf = vf - mean
    if recipe.precision == "int8_fp8":
        values, v_scale = quantize_v_fp8(vf)
    elif recipe.precision == "int8_int8":
        values, v_scale = quantize_v_int8(vf, recipe.block_n, *(() if tiled else (V_MAX, False)))
    else:
        values, v_scale = torch.where(vf.isfinite(), vf, 0.0), vf.new_ones(1)
    return _with_marks(KeyValues(k8, k_scale, shift, values, v_scale, mean, None, None), positive, negative)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    precision: str = "int8_fp16",
    smooth_k: bool = True,
    block_n: int | None = None,
    family: str = "portable",
    attn_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top_left",
) -> tuple[Tensor, Tensor]:
    """Quantized attention.

    q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], fp16 or bf16, any strides, H a multiple of Hk; block_n is the
    number of keys the online softmax takes at a time (None: the family's), fixed for int8_int8; attn_mask, window and
    causal_alignment as in `sagert.attention`. `family` is whose recipe to follow: "portable" scales K by rows, visiting
    keys upwards; "wgmma" scales K by groups of 32 keys, takes V's mean off where it is large, and visits keys downwards
    (K must be finite there); "mma" too, with groups of 16 keys and blocks of 64. Returns (out [B, H, S, Dv] in q's
    dtype, lse fp32 [B, H, S]). ValueError for a precision or a family that has no reference.
    """
    recipe = _recipe(precision, smooth_k, family, block_n)

    def key_values(batch: int, heads: slice) -> KeyValues:
        return quantize_heads(k[batch, heads], v[batch, heads], recipe)

    sizes = (k.shape[1], k.shape[2], v.shape[3])
    return _attend(q, sizes, key_values, recipe, attn_mask, pattern(is_causal, window, causal_alignment), scale)


def _v_scales(seqlen: int, precision: str) -> int:
    """How many scales a channel of V has."""
    return -(-seqlen // V_BLOCK) if precision == "int8_int8" else 1


def kv_bytes(batch: int, heads: int, seqlen: int, head_dim: int, head_dim_v: int, precision: str) -> int:
    """Bytes of quantize_kv's buffer: K in INT8, its scales (4 bytes a key) and shift (4 a channel), and V where the
    precision quantizes it: a byte and scales (4 bytes a channel, or a block and channel)."""
    values = head_dim_v * (seqlen + 4 * _v_scales(seqlen, precision)) if precision != "int8_fp16" else 0
    return batch * heads * (seqlen * (head_dim + 4) + 4 * head_dim + values)


def _sections(
    data: Tensor, shape: tuple[int, int, int, int], head_dim_v: int, precision: str
) -> list[tuple[Tensor, ...]]:
    """Views of quantize_kv's buffer per (batch, head): shift, k_scale, [v_scale,] k8[, v8], 4-byte ones first."""
    b, h, s, d = shape
    quantized, codes = precision != "int8_fp16", torch.int8 if precision == "int8_int8" else torch.uint8
    sizes: list[tuple[torch.dtype, tuple[int, ...]]] = [(torch.float32, (d,)), (torch.float32, (s,))]
    sizes += [(torch.float32, (_v_scales(s, precision), head_dim_v))] if quantized else []
    sizes += [(torch.int8, (s, d)), *([(codes, (s, head_dim_v))] if quantized else [])]
    views: list[Tensor] = []
    start = 0
    for dtype, size in sizes:
        end = start + b * h * math.prod(size) * dtype.itemsize
        views.append(data[start:end].view(dtype).view(b * h, *size))
        start = end
    return list(zip(*(view.unbind(0) for view in views), strict=True))


def quantize_kv(k: Tensor, v: Tensor, *, precision: str, smooth_k: bool = True) -> Tensor:
    """K [B, Hk, Sk, D] and V [B, Hk, Sk, Dv] quantized by the portable recipe: uint8 [kv_bytes(...)]."""
    recipe = _recipe(precision, smooth_k)
    b, h, s, d = k.shape
    data = torch.empty(kv_bytes(b, h, s, d, v.shape[3], precision), dtype=torch.uint8, device=k.device)
    if s == 0:
        return data
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        for index, (shift, k_scale, *rest) in enumerate(_sections(data, (b, h, s, d), v.shape[3], precision)):
            head, values = k[index // h, index % h][None], v[index // h, index % h][None]
            kv = quantize_heads(head, values, recipe)
            shift.copy_(kv.k_shift[0, 0])
            k_scale.copy_(kv.k_scale[0, :, 0])
            if precision != "int8_fp16":
                v_scale, k8, v8 = rest
                v_scale.copy_(kv.v_scale[0])
                v8.copy_((encode_v_int8 if precision == "int8_int8" else encode_v_fp8)(kv.v[0], values[0].float()))
            else:
                (k8,) = rest
            k8.copy_(kv.k[0])
    return data


def attend(
    q: Tensor,
    data: Tensor,
    v: Tensor | None,
    heads_kv: int,
    seqlen_k: int,
    head_dim_v: int,
    *,
    precision: str,
    seen: Pattern,
    scale: float,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over what quantize_kv returned, and `v` [B, Hk, Sk, Dv] where the precision leaves V as it is.

    The same bits as `attention` gives for the same K and V; results as there.
    """
    recipe = _recipe(precision)
    decode = decode_v_int8 if precision == "int8_int8" else decode_v_fp8
    b, d = q.shape[0], q.shape[3]
    sections = _sections(data, (b, heads_kv, seqlen_k, d), head_dim_v, precision)

    def key_values(batch: int, heads: slice) -> KeyValues:
        mine = sections[batch * heads_kv : (batch + 1) * heads_kv][heads]
        shift, k_scale, *rest = (torch.stack(parts) for parts in zip(*mine, strict=True))
        if precision != "int8_fp16":
            v_scale, k8, v8 = rest
            values, positive, negative = decode(v8)
            kv = KeyValues(k8.float(), k_scale[..., None], shift[:, None], values, v_scale, None, None, None)
            return _with_marks(kv, positive, negative)
        if v is None:
            raise ValueError(f"precision={precision!r} reads v, which was not given")
        vf = v[batch, heads].float()
        nan = vf.isnan()
        clean = torch.where(vf.isfinite(), vf, 0.0)
        kv = KeyValues(rest[0].float(), k_scale[..., None], shift[:, None], clean, vf.new_ones(1), None, None, None)
        return _with_marks(kv, nan | (vf == math.inf), nan | (vf == -math.inf))

    return _attend(q, (heads_kv, seqlen_k, head_dim_v), key_values, recipe, attn_mask, seen, scale)


def _attend(
    q: Tensor,
    sizes: tuple[int, int, int],
    key_values: object,
    recipe: Recipe,
    attn_mask: Tensor | None,
    seen: Pattern,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, S, D] over key_values(batch, key heads); `sizes` are Hk, Sk and Dv."""
    b, h, s, d = q.shape
    hk, sk, dv = sizes
    out = torch.zeros(b, h, s, dv, dtype=q.dtype, device=q.device)
    lse = torch.full((b, h, s), -math.inf, dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or sk == 0:
        return out, lse
    scale = d**-0.5 if scale is None else scale
    group = h // hk
    mask = None if attn_mask is None else attn_mask.expand(b, h, s, sk)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        step = max(1, CHUNK_ELEMENTS // (group * s * recipe.block_n))
        for batch in range(b):
            for first in range(0, hk, step):
                heads = slice(first, min(first + step, hk))
                n = heads.stop - first
                queries = slice(first * group, heads.stop * group)
                # The query heads that share a key head are rows of one matrix.
                rows = q[batch, queries].reshape(n, group * s, d)
                part = None if mask is None else mask[batch, queries]
                kv = key_values(batch, heads)  # type: ignore[operator]
                o, z = _heads(rows, kv, s, part, seen, scale, recipe, q.dtype)
                out[batch, queries] = o.view(-1, s, dv).to(q.dtype)
                lse[batch, queries] = z.view(-1, s)
    return out, lse


def _starts(seen: Pattern, s: int, sk: int, block_n: int) -> range:
    """First keys of the blocks that some query sees."""
    low, high = seen.limits(s, sk)
    first = max(0, low) if low is not None else 0
    end = sk if high is None else min(sk, s + high)
    return range(first // block_n * block_n, max(end, 0), block_n)


def _hidden(
    seen: Pattern, queries: Tensor, keys: range, s: int, sk: int, mask: Tensor | None, n: int
) -> tuple[Tensor | None, Tensor | None]:
    """(hidden [rows, keys] or [N, rows, keys], scores to add [N, rows, keys]) of one block of keys, None where none."""
    columns = torch.arange(keys.start, keys.stop, device=queries.device)
    hidden = seen.hidden(queries, columns, s, sk)
    if mask is None:
        return hidden, None
    block = mask[:, :, keys.start : keys.stop].reshape(n, -1, len(keys))
    added = None
    if block.dtype == torch.bool:
        masked = ~block
    else:
        masked = block == -math.inf
        added = block.float() * torch.tensor(LOG2E, dtype=torch.float32)
    return masked if hidden is None else masked | hidden, added


def quantize_queries(q: Tensor, scale: float, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """INT8 values of q [..., D], held in fp32, and the scale of each row [..., 1], with scale * log2(e) in it.

    The portable family scales before it quantizes, the tiled ones after: what lies between two integers may differ.
    """
    factor = torch.tensor(scale * LOG2E, dtype=torch.float32, device=q.device)
    if recipe.family not in TILED:
        return quantize_rows(q.float() * factor, math.nan)
    values, row = quantize_rows(q.float(), math.nan)
    return torch.copysign(torch.ones_like(factor), factor) * values, row * factor.abs()


def _heads(
    q: Tensor, kv: KeyValues, s: int, mask: Tensor | None, seen: Pattern, scale: float, recipe: Recipe, io: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Some key heads: q [N, rows, D], mask [query heads, S, Sk]; fp32 out [N, rows, Dv] and lse [N, rows]."""
    tiled, block_n = recipe.family in TILED, recipe.block_n
    fp8, integer = recipe.precision == "int8_fp8", recipe.precision == "int8_int8"
    n, rows, _ = q.shape
    sk = kv.k.shape[1]
    qf = q.float() * torch.tensor(scale * LOG2E, dtype=torch.float32)
    q8, q_scale = quantize_queries(q, scale, recipe)
    k_scale = kv.k_scale.transpose(1, 2)
    p_scale, slack = TILED_LOG2_P[recipe.precision] if tiled else (LOG2_448 if fp8 else 0.0, 0.0)
    position = torch.arange(s, device=q.device).repeat(rows // s)

    m = qf.new_full((n, rows, 1), -math.inf)
    total = torch.zeros_like(m)
    rounded = torch.zeros_like(m)  # the same of the weights that V is multiplied by
    acc = qf.new_zeros(n, rows, kv.v.shape[2])
    sees = torch.zeros_like(m, dtype=torch.bool)  # rows with a visible key so far
    positive, negative = torch.zeros_like(acc), torch.zeros_like(acc)  # numbers of such entries seen
    starts = _starts(seen, s, sk, block_n)
    for start in reversed(starts) if tiled else starts:
        keys = slice(start, min(start + block_n, sk))
        hidden, added = _hidden(seen, position, range(keys.start, keys.stop), s, sk, mask, n)
        # Products of int8 values summed over D stay below 2**24: exact in fp32.
        scores = (q8 @ kv.k[:, keys].transpose(1, 2)) * k_scale[:, :, keys]
        if added is None:  # the row maximum is taken before Q's scale joins; it is positive, so the order is the same
            scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
            highest = scores.amax(-1, keepdim=True) * q_scale
            scores = scores * q_scale
        else:
            scores = scores * q_scale + added
            scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
            highest = scores.amax(-1, keepdim=True)
        visible = torch.ones_like(scores, dtype=torch.bool) if hidden is None else ~hidden.expand(scores.shape)
        sees = sees | visible.any(-1, keepdim=True)
        m_new = torch.where(highest > m + slack, highest, m)
        base = torch.where(m_new == -math.inf, 0.0, m_new)  # every score so far is -inf: their weight is 0, not NaN
        alpha = torch.exp2(m - base)
        if integer:
            p = 255.0 * torch.exp2(scores - torch.where(highest == -math.inf, 0.0, highest))
            weight = torch.exp2(highest - base) / 255.0
            block = start // block_n
            # Sums of products of bytes over a block stay below 2**24: exact in fp32.
            total = total * alpha + weight * p.sum(-1, keepdim=True)
            p = torch.round(p)
            rounded = rounded * alpha + weight * p.sum(-1, keepdim=True)
            acc = acc * alpha + (p @ kv.v[:, keys]) * (weight * kv.v_scale[:, block : block + 1])
        else:
            exponents = scores - (base - p_scale)
            p = torch.exp2(exponents)
            if recipe.family == "wgmma" and fp8:
                in_half = is_half(position, range(keys.start, keys.stop), q.shape[2])
                p = torch.where(in_half, exp2_half(exponents), p)
            total = total * alpha + p.sum(-1, keepdim=True)
            p = p.clamp(max=448.0).to(torch.float8_e4m3fn).float() if fp8 else p.to(io).float()
            rounded = rounded * alpha + p.sum(-1, keepdim=True)
            acc = acc * alpha + p @ kv.v[:, keys]
        if kv.positive is not None and kv.negative is not None:
            positive = positive + visible.float() @ kv.positive[:, keys].float()
            negative = negative + visible.float() @ kv.negative[:, keys].float()
        m = m_new
    out = acc / (rounded if integer or (fp8 and recipe.family == "wgmma") else total)
    if fp8:
        out = out * kv.v_scale
    if kv.v_mean is not None:
        out = out + kv.v_mean
    if kv.positive is not None:
        # V's infinities and NaNs were left out of the products; each reaches exactly the rows that see its key.
        out = torch.where(positive > 0, out + math.inf, out)
        out = torch.where(negative > 0, out - math.inf, out)
    lse = m + torch.log2(rounded if integer and recipe.family == "mma" else total) - p_scale
    lse = lse + (qf * kv.k_shift).sum(-1, keepdim=True)
    out, lse = torch.where(sees, out, 0.0), torch.where(sees, lse, -math.inf)
    return out, (lse * LN2).squeeze(-1)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """`attention` of each packed sequence: q [total_q, H, D], k [total_k, Hk, D], v [total_k, Hk, Dv].

    cu_seqlens int32 [N + 1]; options as in `attention`. Returns (out [total_q, H, Dv], lse fp32 [H, total_q]).
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
    for queries, keys in segments(cu_seqlens_q, cu_seqlens_k):
        parts = (t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys]))
        o, z = attention(*parts, **options)  # type: ignore[arg-type]
        out[queries] = o[0].transpose(0, 1)
        lse[:, queries] = z[0]
    return out, lse
