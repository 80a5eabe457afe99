# SPDX-License-Identifier: Apache-2.0
"""Runs the general kernels on CPU tensors, as the host library does, and says in float64 what they should give."""

import math

import general
import mask as mask_kernels
import prepass
import repair
import torch
from harness import BLOCK, KEY_PAD, PV_TYPES, _poisoned, _vec, pv_of
from triton import cdiv

FAR = 1 << 30
DTYPE_CODES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.bool: 4}
LIST_HEAD = 4


def _empty(dtype):
    return torch.zeros(16, dtype=dtype)


class _Mask:
    """A mask as attention reads it, and the lists of blocks."""

    def __init__(self, mask, q, sk, tiles, window, *, block_m, block_n, chunk):
        b, h, s = q.shape[:3]
        left, right, bottom_right = window
        mask = mask.expand(b, h, s, sk)
        stride = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        raw = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        aligned = mask.data_ptr() % 16 == 0 and stride[3] == 1 and all(n % 16 == 0 for n in stride[:3])
        other = mask.dtype in (torch.float16, torch.bfloat16) and mask.dtype != q.dtype
        kind = {torch.bool: 1, q.dtype: 2}.get(mask.dtype, 3)
        masks_b, masks_h = (1 if stride[0] == 0 else b), (1 if stride[1] == 0 else h)
        masks, blocks = masks_b * masks_h, cdiv(sk, block_n)
        copy = 0 if aligned and sk % 16 == 0 and not other else 2 if other else 1
        self.kind, self.strides = kind, stride[:3]
        views = {dtype: _empty(dtype) for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32)}
        views[raw.dtype] = raw
        read = dict(views)
        copied = torch.float32 if copy == 2 else raw.dtype
        row = cdiv(sk, 16) * 16
        copy_rows = 1 if stride[2] == 0 else s
        targets = {dtype: _empty(dtype) for dtype in views}
        if copy:
            targets[copied] = _poisoned((masks, copy_rows, row), copied)
            read[copied] = targets[copied]
            per_row = 0 if stride[2] == 0 else row
            per_mask = copy_rows * row
            self.strides = [per_mask * masks_h if masks_b > 1 else 0, per_mask if masks_h > 1 else 0, per_row]
        classes = _poisoned((masks, tiles, blocks), torch.uint8)
        size = LIST_HEAD + blocks
        self.lists = _poisoned((masks, tiles, size), torch.int32)
        chunks = cdiv(blocks, chunk)
        # The interpreter reads from a tensor's own start: views of expanded tensors begin there.
        mask_kernels.scan_mask[(masks * tiles * chunks,)](
            views[torch.uint8], views[torch.float16], views[torch.bfloat16], views[torch.float32], classes,
            targets[torch.uint8], targets[q.dtype], targets[torch.float32],
            DTYPE_CODES[mask.dtype], s, sk, tiles, blocks, chunks, chunk, masks_h, left, right, bottom_right,
            *stride, int(aligned), copy, per_mask if copy else 0, self.strides[2] if copy else 0,
            BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
        mask_kernels.list_blocks[(masks * tiles,)](classes, self.lists, blocks, size, CHUNK=16)
        self.size = size
        self.list_strides = [tiles * masks_h if masks_b > 1 else 0, tiles if masks_h > 1 else 0]
        self.read = [read[torch.uint8], read[q.dtype], read[torch.float32]]


def run(
    q, k, v, *, precision, mask=None, causal=False, window=None, bottom_right=False, cu_q=None, cu_k=None,
    max_q=0, max_k=0, scale=None, smooth_k=True, tiles=(64, 64), carrier=torch.int8, chunk=2,
):  # fmt: skip
    """Attention through the general kernels.

    q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; with cu_q and cu_k [N + 1] packed: q [1, H, total_q, D] and so
    on. Returns (out, lse).
    """
    b, h, s, d = q.shape
    hk, sk = k.shape[1:3]
    dv = v.shape[3]
    varlen = cu_q is not None
    pv = pv_of(precision, carrier)
    quantized, transposed = pv != "io", pv in ("i8", "fp8e4nv")
    dp = next(size for size in (64, 128, 256) if max(d, dv) <= size)
    batch = len(cu_q) - 1 if varlen else b
    len_q, len_k = (max_q, max_k) if varlen else (s, sk)
    skp = max(cdiv(len_k, KEY_PAD), 1) * KEY_PAD
    k_rows = (sk // KEY_PAD + batch) * KEY_PAD if varlen else skp
    kv_heads = hk if varlen else b * hk
    nb = batch * hk
    q_rows = s
    scale = d**-0.5 if scale is None else scale
    parts = min(max(cdiv(len_k, 128), 1), 32)
    part_rows = max(cdiv(cdiv(len_k, parts), BLOCK) * BLOCK, BLOCK)
    parts = max(cdiv(len_k, part_rows), 1)
    left, right = (FAR if w is None or w < 0 else w for w in (window or (None, None)))
    right = min(right, 0) if causal else right

    k_sum, v_amax = _poisoned((nb, parts, dp), torch.float32), _poisoned((nb, parts, dp), torch.float32)
    v_bad, v_first = _poisoned((nb, parts, 2, dp), torch.int32), _poisoned((nb, 2, dp), torch.int32)
    k_bad, flags = _poisoned((nb, parts), torch.int32), _poisoned((nb,), torch.int32)
    k_shift = _poisoned((nb, dp), torch.float32)
    scales = (kv_heads, k_rows // BLOCK, 2, dp) if precision == "int8_int8" else (nb, dp)
    v_scale = _poisoned(scales, torch.float32)
    k8, k_scale = _poisoned((kv_heads, k_rows, dp), carrier), _poisoned((kv_heads, k_rows), torch.float32)
    q8 = _poisoned((b * h, s, dp), carrier)
    q_scale, q_shift = _poisoned((b * h, s), torch.float32), _poisoned((b * h, s), torch.float32)
    copy_v = not quantized and not _vec(v, dp)
    v_out = _poisoned((kv_heads, dp, k_rows) if transposed else (kv_heads, k_rows, dp), PV_TYPES.get(pv, v.dtype))
    out = _poisoned((b, h, s, dv), q.dtype)
    lse = _poisoned((b, h, s), torch.float32)
    cu = [x.int() if varlen else _empty(torch.int32) for x in (cu_q, cu_k)]
    q_stride, k_stride, v_stride, o_stride = (
        [0, *x.stride()[1:]] if varlen else list(x.stride()) for x in (q, k, v, out)
    )

    kv_strides = (*k_stride, *v_stride, _vec(k, dp), _vec(v, dp))
    prepass.kv_stats[(nb * parts,)](
        k, v, k_sum, v_amax, v_bad, k_bad, cu[1], len_k, hk, parts, part_rows, d, dv, int(varlen), *kv_strides,
        D=dp, BLOCK=BLOCK, V_STATS=2 if pv == "fp8e4nv" else 1,
    )  # fmt: skip
    prepass.quantize_kv[(nb * (skp // BLOCK),)](
        k, v, k_sum, v_amax, v_bad, k_bad, k_shift, k8, k_scale, v_out, v_scale, v_first, flags, cu[1],
        len_k, skp, k_rows, hk, parts, d, dv, int(smooth_k), int(copy_v), 1, int(varlen), *kv_strides,
        D=dp, BLOCK=BLOCK, V_STATS=2 if pv == "fp8e4nv" else 1, PV=pv,
    )  # fmt: skip
    prepass.quantize_q[(batch * h * cdiv(len_q, BLOCK),)](
        q, k_shift, q8, q_scale, q_shift, cu[0], scale * math.log2(math.e), len_q, q_rows, h, h // hk, d, int(varlen),
        *q_stride, _vec(q, dp), int(smooth_k), D=dp, BLOCK=BLOCK,
    )  # fmt: skip
    per_batch = 0 if varlen else hk
    if transposed:
        values, v_strides = v_out, (per_batch * dp * k_rows, dp * k_rows, k_rows)
    elif quantized or copy_v:
        values, v_strides = v_out, (per_batch * k_rows * dp, k_rows * dp, dp)
    else:
        values, v_strides = v, v_stride[:3]
    block_m, block_n = tiles
    q_tiles = cdiv(len_q, block_m)
    lists, masks, mask_strides, list_strides, kind = _empty(torch.int32), None, [0, 0, 0], [0, 0, 0], 0
    if mask is not None and sk > 0:
        found = _Mask(
            mask, q, sk, q_tiles, (left, right, int(bottom_right)), block_m=block_m, block_n=block_n, chunk=chunk
        )
        lists, masks, mask_strides, kind = found.lists, found.read, found.strides, found.kind
        list_strides = [*found.list_strides, found.size]
    masks = masks or [_empty(torch.uint8), _empty(q.dtype), _empty(torch.float32)]
    channels = min(dp, 128)
    v_parts = cdiv(dv, channels)
    general.attention[(batch * h * q_tiles * v_parts,)](
        q8, q_scale, q_shift, k8, k_scale, values, v_scale, flags, out, lse, *cu, *masks, lists,
        len_q, len_k, q_rows, k_rows, h, h // hk, dv, v_parts, left, right, int(bottom_right), int(varlen),
        int(not quantized and not copy_v), *v_strides, *o_stride, _vec(out, dp), 1, int(smooth_k),
        kind, *mask_strides, *list_strides,
        D=dp, DV=channels, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=2, MASK_STAGES=2, PV=pv,
    )  # fmt: skip
    parts = 2
    repair.repair[(batch * h * parts,)](
        values, flags, out, *cu, *masks, len_q, len_k, q_rows, k_rows, h, h // hk, dv, left, right, int(bottom_right),
        int(varlen), int(not quantized and not copy_v), *v_strides, *o_stride, kind, *mask_strides, parts,
        BLOCK_M=32, BLOCK_N=32, BLOCK_D=32, PV=pv,
    )  # fmt: skip
    return out, lse


def visible(s, sk, *, mask=None, causal=False, window=None, bottom_right=False):
    """Which keys each query sees, as masks broadcast: [..., S, Sk]."""
    position = torch.arange(s)[:, None] + (sk - s if bottom_right else 0)
    keys = torch.arange(sk)[None, :]
    left, right = (None if w is None or w < 0 else w for w in (window or (None, None)))
    seen = torch.ones(s, sk, dtype=torch.bool)
    if left is not None:
        seen &= keys >= position - left
    if right is not None:
        seen &= keys <= position + right
    if causal:
        seen &= keys <= position
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return seen


def exact(q, k, v, *, mask=None, scale=None, **place):
    """Attention in float64: (out, lse). A value of V reaches the queries that see its key, and no others."""
    h, s, d = q.shape[1:]
    group, sk = h // max(k.shape[1], 1), k.shape[2]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (d**-0.5 if scale is None else scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    seen = visible(s, sk, mask=mask, **place).expand_as(scores)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1) if sk else torch.full(scores.shape[:3], -math.inf, dtype=torch.float64)
    none = ~seen.any(-1)
    p = torch.softmax(scores.masked_fill(none[..., None], 0.0), -1).masked_fill(none[..., None], 0.0)
    out = p @ torch.where(v.isfinite(), v, 0.0)
    for bad in (v == math.inf, v == -math.inf, v.isnan()):
        reached = seen.double() @ bad.double() > 0
        value = math.inf if bool((v[bad] == math.inf).any()) else -math.inf
        value = math.nan if bool(v[bad].isnan().any()) else value
        out = torch.where(reached, out + value, out)
    return out, lse
