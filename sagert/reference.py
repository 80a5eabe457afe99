# SPDX-License-Identifier: Apache-2.0
"""The kernels' arithmetic in plain torch: what CPU tensors run on, and the oracle of the tests.

Same steps and same rounding as the kernels, in fp32, over the same key blocks; it differs from them by the order of
additions inside a matrix product and by the last bit of exp2. `sagert.exact` is float64 attention without any
quantization, which accuracy is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sagert.exact import error_metrics as error_metrics
from sagert.exact import exact_attention as exact_attention
from sagert.exponential import exp2_half, is_half
from sagert.half_output import HALF_KEYS, HalfOutput, add_products
from sagert.half_output import LOG2_P as HALF_OUTPUT_LOG2_P
from sagert.recipes import (
    LOG2E,
    KeyValues,
    Recipe,
    means_scores,
    quantize_heads,
    quantize_queries,
    recipe_of,
)
from sagert.recipes import PRECISIONS as PRECISIONS
from sagert.visibility import Pattern, pattern, segments

LN2 = math.log(2.0)
CHUNK_ELEMENTS = 1 << 24  # scores held at a time: 64 MiB in fp32


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
    half_sums: bool = False,
    even_v: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantized attention.

    q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], fp16 or bf16, any strides, H a multiple of Hk; block_n is the
    number of keys the online softmax takes at a time (None: the family's), fixed for int8_int8, but 64 (None) or 128 in
    the "mma" family, whose rows differ; attn_mask, window and causal_alignment as in `sagert.attention`. `family` is
    whose recipe to follow: "portable" scales K by rows, visiting keys upwards; "wgmma" scales K by groups of 32 keys,
    takes V's mean off where it is large, and visits keys downwards (K must be finite there); "mma" too, with groups of
    16 keys and blocks of 64 (or twice that), and it alone has INT4 (SageAttention2, arXiv 2411.10958) and half_sums:
    rows that sum the products of 64 keys in fp16 (SageAttention2++, arXiv 2505.21136), or, of int8_int8, even_v: rows
    with one factor for V's channels where `sagert.quantize.quantize_v_int8_even` says so.
    Returns (out [B, H, S, Dv] in q's dtype, lse fp32 [B, H, S]). ValueError for what has no reference.
    """
    recipe = recipe_of(precision, smooth_k, family, block_n, half_sums, even_v)

    def key_values(batch: int, heads: slice) -> KeyValues:
        return quantize_heads(k[batch, heads], v[batch, heads], recipe)

    sizes = (k.shape[1], k.shape[2], v.shape[3])
    return attend_heads(q, sizes, key_values, recipe, attn_mask, pattern(is_causal, window, causal_alignment), scale)


def attend_heads(
    q: Tensor,
    sizes: tuple[int, int, int],
    key_values: Callable[[int, slice], KeyValues],
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
                kv = key_values(batch, heads)
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


def _weigh_bytes(scores: Tensor, highest: Tensor) -> Tensor:
    """Weights 0 to 255 of a block of keys, 255 at its maximum, before they are rounded."""
    return 255.0 * torch.exp2(scores - torch.where(highest == -math.inf, 0.0, highest))


def _take_leading(scores: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hides finite scores [N, rows, keys], a view. Returns their weights, what scales the sums before, the maximum."""
    takes = scores.isfinite()
    taken = torch.where(takes, scores, -math.inf)
    scores.masked_fill_(takes, -math.inf)
    m_new = torch.maximum(m, taken.amax(-1, keepdim=True))
    base = torch.where(m_new == -math.inf, 0.0, m_new)
    return torch.exp2(taken - base), torch.exp2(m - base), m_new


def _heads(
    q: Tensor,
    kv: KeyValues,
    s: int,
    mask: Tensor | None,
    seen: Pattern,
    scale: float,
    recipe: Recipe,
    io: torch.dtype,
    in_half: bool = True,
) -> tuple[Tensor, Tensor]:
    """Some key heads: q [N, rows, D], mask [query heads, S, Sk]; fp32 out [N, rows, Dv] and lse [N, rows].

    in_half: O is summed in fp16, where the recipe does so.
    """
    tiled, block_n = recipe.tiled, recipe.block_n
    fp8, integer = recipe.pv == "fp8", recipe.pv == "int8"
    n, rows, _ = q.shape
    sk = kv.k.shape[1]
    qf = q.float() * torch.tensor(scale * LOG2E, dtype=torch.float32)
    queries = quantize_queries(q, scale, recipe, s)
    k_scale = kv.k_scale.transpose(1, 2)
    p_scale, slack = recipe.log2_p
    p_type = torch.float16 if recipe.half_sums else io
    position = torch.arange(s, device=q.device).repeat(rows // s)

    m = qf.new_full((n, rows, 1), -math.inf)
    total = torch.zeros_like(m)
    rounded = torch.zeros_like(m)  # the same of the weights that V is multiplied by
    acc = qf.new_zeros(n, rows, kv.v.shape[2])
    sees = torch.zeros_like(m, dtype=torch.bool)  # rows with a visible key so far
    positive, negative = torch.zeros_like(acc), torch.zeros_like(acc)  # numbers of such entries seen
    half = HalfOutput(acc, block_n) if recipe.half_output and in_half else None
    if half is not None:
        p_scale = HALF_OUTPUT_LOG2_P
    starts = _starts(seen, s, sk, block_n)
    for start in reversed(starts) if tiled else starts:
        keys = slice(start, min(start + block_n, sk))
        hidden, added = _hidden(seen, position, range(keys.start, keys.stop), s, sk, mask, n)
        of_means = means_scores(queries, kv, keys)
        if of_means is not None:
            added = of_means if added is None else added + of_means
        # Products of integers summed over D stay below 2**24: exact in fp32.
        scores = (queries.values @ kv.k[:, keys].transpose(1, 2)) * k_scale[:, :, keys]
        if added is None:  # the row maximum is taken before Q's scale joins; it is positive, so the order is the same
            scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
            highest = scores.amax(-1, keepdim=True) * queries.scale
            scores = scores * queries.scale
        else:
            scores = scores * queries.scale + added
            scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
            highest = scores.amax(-1, keepdim=True)
        visible = torch.ones_like(scores, dtype=torch.bool) if hidden is None else ~hidden.expand(scores.shape)
        sees = sees | visible.any(-1, keepdim=True)
        if kv.leading_v is not None and start == 0:
            p, alpha, m = _take_leading(scores[:, :, : kv.leading_v.shape[1]], m)
            total, rounded = (x * alpha + p.sum(-1, keepdim=True) for x in (total, rounded))
            acc = acc * alpha + p @ kv.leading_v
            highest = scores.amax(-1, keepdim=True)
        m_new = torch.where(highest > m + slack, highest, m)
        base = torch.where(m_new == -math.inf, 0.0, m_new)  # every score so far is -inf: their weight is 0, not NaN
        alpha = torch.exp2(m - base)
        if integer:
            p = _weigh_bytes(scores, highest)
            weight = torch.exp2(highest - base) / 255.0
            block = start // block_n
            # Sums of products of bytes over a block stay below 2**24: exact in fp32.
            total = total * alpha + weight * p.sum(-1, keepdim=True)
            unit = weight * kv.v_scale[:, block : block + 1]
            p = torch.round(p)
            rounded = rounded * alpha + weight * p.sum(-1, keepdim=True)
            acc = acc * alpha + (p @ kv.v[:, keys]) * unit
        else:
            exponents = scores - (base - p_scale)
            p = torch.exp2(exponents)
            if recipe.family == "wgmma" and fp8:
                by_pairs = is_half(position, range(keys.start, keys.stop), q.shape[2], block_n)
                p[:, by_pairs] = exp2_half(exponents[:, by_pairs])
            total = total * alpha + p.sum(-1, keepdim=True)
            p = p.clamp(max=448.0).to(torch.float8_e4m3fn).float() if fp8 else p.to(p_type).float()
            rounded = rounded * alpha + p.sum(-1, keepdim=True)
            if half is not None:
                steps = half.add(alpha, p, kv.v[:, keys], sees)
                m_new, total = m_new + steps, total * torch.exp2(-steps)
            else:
                v = kv.v[:, keys]
                half_sums = recipe.half_sums
                products = add_products(torch.zeros_like(acc), p, v, HALF_KEYS[recipe.pv]) if half_sums else p @ v
                acc = acc * alpha + products
        if kv.positive is not None and kv.negative is not None:
            positive = positive + visible.float() @ kv.positive[:, keys].float()
            negative = negative + visible.float() @ kv.negative[:, keys].float()
        m = m_new
    if half is not None:
        acc, rounded = half.output(), half.sums
    # Where the tensor core sums P, it is as P is rounded.
    sums_rounded = integer or (recipe.family == "wgmma" and (fp8 or q.shape[2] <= 64))
    out = acc / (rounded if sums_rounded else total)
    if not integer:  # INT8's scales are a block's, and in the sums
        out = out * kv.v_scale
    if kv.v_unit is not None:
        out = out * kv.v_unit
    if kv.v_mean is not None:
        out = out + kv.v_mean
    if kv.positive is not None:
        # V's infinities and NaNs were left out of the products; each reaches exactly the rows that see its key.
        out = torch.where(positive > 0, out + math.inf, out)
        out = torch.where(negative > 0, out - math.inf, out)
    lse = m + torch.log2(rounded if integer and recipe.family == "mma" else total) - p_scale
    lse = lse + (qf * kv.k_shift).sum(-1, keepdim=True)
    out, lse = torch.where(sees, out, 0.0), torch.where(sees, lse, -math.inf) * LN2
    if half is not None and half.overflown().any():
        again = _heads(q, kv, s, mask, seen, scale, recipe, io, in_half=False)
        out = torch.where(half.overflown(), again[0], out)
        lse = torch.where(half.overflown(), again[1].unsqueeze(-1), lse)
    return out, lse.squeeze(-1)


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
