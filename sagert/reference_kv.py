# SPDX-License-Identifier: Apache-2.0
"""Keys and values quantized once, on the CPU: the buffer's layout, and attention over it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sagert.quantize import V_BLOCK, decode_v_fp8, decode_v_int8, encode_v_fp8, encode_v_int8
from sagert.recipes import KeyValues, quantize_heads, recipe_of, with_marks
from sagert.reference import attend_heads
from sagert.visibility import Pattern


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
    recipe = recipe_of(precision, smooth_k)
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
    recipe = recipe_of(precision)
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
            return with_marks(kv, positive, negative)
        if v is None:
            raise ValueError(f"precision={precision!r} reads v, which was not given")
        vf = v[batch, heads].float()
        nan = vf.isnan()
        clean = torch.where(vf.isfinite(), vf, 0.0)
        kv = KeyValues(rest[0].float(), k_scale[..., None], shift[:, None], clean, vf.new_ones(1), None, None, None)
        return with_marks(kv, nan | (vf == math.inf), nan | (vf == -math.inf))

    return attend_heads(q, (heads_kv, seqlen_k, head_dim_v), key_values, recipe, attn_mask, seen, scale)
