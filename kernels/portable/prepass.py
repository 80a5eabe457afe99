# SPDX-License-Identifier: Apache-2.0
"""Pre-pass of the portable family: K shift, INT8 Q and K, V in the form P V reads.

Workspace buffers are contiguous, padded to D (64, 128 or 256) channels, and K and V to a multiple of 128 keys:
  KSum, VAmax fp32 [B*Hk, parts, D], VBad i32 [B*Hk, parts, 2, D], KBad i32 [B*Hk, parts]   partial statistics
  KShift fp32 [B*Hk, D]; K8 [B*Hk, seqlen_pad, D]; KScale fp32 [B*Hk, seqlen_pad]
  VOut e4m3 or INT8 [B*Hk, D, seqlen_pad] in pair order, or 16-bit [B*Hk, seqlen_pad, D]; VScale fp32 [B*Hk, D], or of
    integers [B*Hk, seqlen_pad / 64, 2, D], see integers.py
  VFirst i32 [B*Hk, 2, D]   first key whose V is +inf or NaN, -inf or NaN
  HeadFlags i32 [B*Hk]   1: V holds an infinity or NaN, 2: K does, 3: both
  Q8 [B*H, S, D]; QScale, QShift fp32 [B*H, S]
With packed sequences (varlen) B*Hk, seqlen_pad becomes Hk, k_rows and B*H, S becomes H, q_rows in the buffers of rows
of Q, K and V; see packed_keys and packed_queries of tiles.py for the rows.

INT8 uses one scale per row of Q and of K (SageAttention2, arXiv 2411.10958, smooths K the same way; its groups are
larger). A row of K that holds an infinity becomes +-127 at the infinities with scale inf, one that holds a NaN gets
scale NaN, so that its scores are what exact attention gives.
"""

import triton
import triton.language as tl
from integers import V_BLOCK, quantize_values
from tiles import load_tile, packed_keys, packed_queries, pair_order

NEVER = tl.constexpr(2147483647)  # key index that no query reaches
MAX_PARTS = tl.constexpr(32)  # partial statistics of one head; the host splits no finer
TINY = tl.constexpr(1.0e-30)  # below this a row or channel counts as zero: 127 / amax must stay finite


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_vectors(base, row, end, stride_s, D: tl.constexpr, BLOCK: tl.constexpr):
    """load_tile of a tensor that vectors can read."""
    rows = row + tl.arange(0, BLOCK)
    pointers = base + (rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, D)[None, :])
    pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, D))
    return tl.load(pointers, mask=(rows < end)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _quantize_rows(x):
    """INT8 values (as fp32, half to even), scales and largest magnitudes of the rows of x [BLOCK, D].

    inf and NaN stay in the scales and magnitudes.
    """
    amax = tl.reduce(tl.abs(x), 1, _nan_max)
    inv = tl.where(amax < TINY, 0.0, 127.0 / tl.where(amax < TINY, 1.0, amax))
    # An infinite amax gives inv 0: finite entries become 0, infinite ones are set apart.
    y = tl.where(tl.abs(x) == float("inf"), tl.where(x > 0, 127.0, -127.0), x * inv[:, None])
    y = tl.where(y == y, y, 0.0)
    y = (y + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to an integer, half to even
    return y, tl.where(amax < TINY, 1.0, amax * (1.0 / 127.0)), amax


@triton.jit
def _store_carrier(pointers, y, mask):
    """Stores integers held in fp32 as INT8, or in the 16-bit float that carries them where INT8 has no tensor core."""
    if pointers.dtype.element_ty == tl.int8:
        tl.store(pointers, y.to(tl.int32).to(tl.int8), mask=mask)
    else:
        tl.store(pointers, y.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _mark_nonfinite(v8, v):
    """FP8 values of magnitudes up to 416 with what is infinite or NaN in v as 448 (+inf), -448 (-inf) and -0 (NaN).

    All three are finite: a query that does not see the key has weight 0 for it, whatever stands there.
    """
    bits = v8.to(tl.uint8, bitcast=True).to(tl.int32)
    bits = tl.where(bits == 0x80, 0, bits)
    bits = tl.where(v == float("inf"), 0x7E, tl.where(v == float("-inf"), 0xFE, bits))
    return tl.where(v == v, bits, 0x80).to(tl.uint8).to(v8.dtype, bitcast=True)


@triton.jit
def kv_stats(
    K, V, KSum, VAmax, VBad, KBad, CuK,
    seqlen_k, heads_kv, parts, part_rows, head_dim, head_dim_v, varlen,
    k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, k_vec, v_vec,
    D: tl.constexpr, BLOCK: tl.constexpr, V_STATS: tl.constexpr,
):  # fmt: skip
    """Sums of K, and of V the largest magnitude (V_STATS 2) and the first non-finite keys (V_STATS 1, 2), per part."""
    pid = tl.program_id(0)
    part = pid % parts
    bh = pid // parts
    b = (bh // heads_kv).to(tl.int64)
    h = (bh % heads_kv).to(tl.int64)
    d = tl.arange(0, D)
    _, k_start, _, seqlen_k = packed_keys(CuK, b, h, heads_kv, seqlen_k, 0, varlen)
    k_base = K + b * k_sb + h * k_sh + k_start * k_ss
    v_base = V + b * v_sb + h * v_sh + k_start * v_ss
    first_row = part * part_rows
    last_row = tl.minimum(first_row + part_rows, seqlen_k)
    offset = (bh.to(tl.int64) * parts + part) * D

    sums = tl.zeros([BLOCK, D], tl.float32)
    amax = tl.zeros([BLOCK, D], tl.float32)
    if (k_vec != 0) & (v_vec != 0):  # without a branch inside, the loop's loads run ahead of it
        for row in tl.range(first_row, last_row, BLOCK, num_stages=3):
            sums += _load_vectors(k_base, row, last_row, k_ss, D, BLOCK)
            if V_STATS > 0:
                amax = _nan_max(amax, tl.abs(_load_vectors(v_base, row, last_row, v_ss, D, BLOCK)))
    else:
        for row in tl.range(first_row, last_row, BLOCK, num_stages=1):
            sums += load_tile(k_base, row, last_row, k_ss, k_sd, head_dim, k_vec, D, BLOCK)
            if V_STATS > 0:
                amax = _nan_max(amax, tl.abs(load_tile(v_base, row, last_row, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)))
    k_sum = tl.sum(sums, 0)
    v_amax = tl.reduce(amax, 0, _nan_max)
    k_bad = tl.max((~_is_finite(k_sum)).to(tl.int32), 0)
    tl.store(KBad + bh.to(tl.int64) * parts + part, k_bad)
    if k_bad > 0:  # rare: leave non-finite keys out
        k_sum = tl.zeros([D], tl.float32)
        for row in tl.range(first_row, last_row, BLOCK, num_stages=1):
            k = load_tile(k_base, row, last_row, k_ss, k_sd, head_dim, k_vec, D, BLOCK)
            k_sum += tl.sum(tl.where(_is_finite(k), k, 0.0), 0)
    tl.store(KSum + offset + d, k_sum)
    if V_STATS > 0:
        bad_pos = tl.full([D], NEVER, tl.int32)
        bad_neg = tl.full([D], NEVER, tl.int32)
        if tl.max((~_is_finite(v_amax)).to(tl.int32), 0) > 0:  # rare: find the non-finite values
            v_amax = tl.zeros([D], tl.float32)
            for row in tl.range(first_row, last_row, BLOCK, num_stages=1):
                v = load_tile(v_base, row, last_row, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
                keys = (row + tl.arange(0, BLOCK))[:, None]
                bad_pos = tl.minimum(bad_pos, tl.min(tl.where((v != v) | (v == float("inf")), keys, NEVER), 0))
                bad_neg = tl.minimum(bad_neg, tl.min(tl.where((v != v) | (v == float("-inf")), keys, NEVER), 0))
                v_amax = tl.maximum(v_amax, tl.max(tl.where(_is_finite(v), tl.abs(v), 0.0), 0))
        tl.store(VBad + 2 * offset + d, bad_pos)
        tl.store(VBad + 2 * offset + D + d, bad_neg)
    if V_STATS > 1:
        tl.store(VAmax + offset + d, v_amax)


@triton.jit
def quantize_kv(
    K, V, KSum, VAmax, VBad, KBad, KShift, K8, KScale, VOut, VScale, VFirst, HeadFlags, CuK,
    seqlen_k, seqlen_pad, k_rows, heads_kv, parts, head_dim, head_dim_v, smooth_k, copy_v, keep_bad, varlen,
    k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, k_vec, v_vec,
    D: tl.constexpr, BLOCK: tl.constexpr, V_STATS: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """One block of keys: reduces the partial statistics, then writes K8 and, as PV or copy_v ask, V."""
    pid = tl.program_id(0)
    blocks = seqlen_pad // BLOCK
    block = pid % blocks
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads_kv
    h = bh % heads_kv
    d = tl.arange(0, D)
    row = block * BLOCK
    rows = row + tl.arange(0, BLOCK)
    part = tl.arange(0, MAX_PARTS)[:, None]
    partial = (bh * parts + part) * D + d[None, :]
    has_part = part < parts
    k_row, k_start, k_pad, seqlen_k = packed_keys(CuK, b, h, heads_kv, seqlen_k, k_rows, varlen)
    exists = True  # a packed sequence may end before the longest one
    if varlen != 0:
        exists = row < seqlen_k

    shift = tl.zeros([D], tl.float32)
    if smooth_k != 0:
        shift = tl.sum(tl.load(KSum + partial, mask=has_part, other=0.0), 0) / seqlen_k.to(tl.float32)
        shift = tl.where(_is_finite(shift), shift, 0.0)
    if block == 0:
        tl.store(KShift + bh * D + d, shift)

    if exists:
        k_base = K + b * k_sb + h * k_sh + k_start * k_ss
        k = load_tile(k_base, row, seqlen_k, k_ss, k_sd, head_dim, k_vec, D, BLOCK)
        k = tl.where((rows < seqlen_k)[:, None], k - shift[None, :], 0.0)
        k8, k_scale, _ = _quantize_rows(k)
        _store_carrier(K8 + (k_row + k_pad) * D + rows[:, None] * D + d[None, :], k8, None)
        tl.store(KScale + k_row + k_pad + rows, k_scale)

    if V_STATS > 0:
        if block == 0:
            bad = VBad + (2 * partial - d[None, :])  # [parts, 2, D]
            first_pos = tl.min(tl.load(bad, mask=has_part, other=NEVER), 0)
            first_neg = tl.min(tl.load(bad + D, mask=has_part, other=NEVER), 0)
            tl.store(VFirst + 2 * bh * D + d, first_pos)
            tl.store(VFirst + 2 * bh * D + D + d, first_neg)
            v_bad = (tl.min(tl.minimum(first_pos, first_neg), 0) < NEVER).to(tl.int32)
            p = tl.arange(0, MAX_PARTS)
            k_bad = tl.max(tl.load(KBad + bh * parts + p, mask=p < parts, other=0), 0)
            tl.store(HeadFlags + bh, v_bad + 2 * k_bad)

    v_base = V + b * v_sb + h * v_sh + k_start * v_ss
    if PV == "fp8e4nv":
        amax = tl.max(tl.load(VAmax + partial, mask=has_part, other=0.0), 0)
        zero = amax < TINY
        limit = 448.0
        marked = keep_bad != 0
        if keep_bad != 0:
            bad = VBad + (2 * partial - d[None, :])
            first_bad = tl.minimum(
                tl.load(bad, mask=has_part, other=NEVER), tl.load(bad + D, mask=has_part, other=NEVER)
            )
            marked = tl.min(tl.min(first_bad, 1), 0) < NEVER
            limit = tl.where(marked, 416.0, 448.0)
        if block == 0:
            tl.store(VScale + bh * D + d, tl.where(zero, 1.0, amax * (1.0 / limit)))
        if exists:
            inv = tl.where(zero, 0.0, limit / tl.where(zero, 1.0, amax))
            v = load_tile(v_base, row, seqlen_k, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
            x = tl.where(_is_finite(v), v, 0.0) * inv[None, :]
            v8 = tl.minimum(tl.maximum(x, -limit), limit).to(tl.float8e4nv)
            if marked:
                v8 = _mark_nonfinite(v8, v)
            v8 = pair_order(tl.trans(v8), D, BLOCK)
            tl.store(VOut + k_row * D + k_pad + d[:, None] * k_rows + rows[None, :], v8)
    elif PV == "i8" or PV == "fp16":
        tl.static_assert(BLOCK == V_BLOCK)
        if exists:
            v = load_tile(v_base, row, seqlen_k, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
            y, v_scale, v_sum = quantize_values(v, PV == "i8")
            scales = VScale + ((k_row + k_pad + row) // V_BLOCK * (2 * D) + d)
            tl.store(scales, v_scale)
            tl.store(scales + D, v_sum)
            if PV == "i8":
                v8 = pair_order(tl.trans(y.to(tl.int32).to(tl.int8)), D, BLOCK)
                tl.store(VOut + k_row * D + k_pad + d[:, None] * k_rows + rows[None, :], v8)
            else:  # not transposed: there infinities and NaN stay what they are
                pointers = VOut + (k_row + k_pad) * D + rows[:, None] * D + d[None, :]
                tl.store(pointers, tl.where(tl.abs(v) < float("inf"), y, v).to(VOut.dtype.element_ty))
    elif copy_v != 0:
        if exists:
            v = load_tile(v_base, row, seqlen_k, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
            pointers = VOut + (k_row + k_pad) * D + rows[:, None] * D + d[None, :]
            tl.store(pointers, v.to(VOut.dtype.element_ty))


@triton.jit
def quantize_q(
    Q, KShift, Q8, QScale, QShift, CuQ,
    scale_log2, seqlen_q, q_rows, heads_q, group, head_dim, varlen, q_sb, q_sh, q_ss, q_sd, q_vec, shift_lse,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of queries, scaled by softmax_scale * log2(e); with shift_lse also their products with the K shift."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(seqlen_q, BLOCK)
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads_q
    h = bh % heads_q
    d = tl.arange(0, D)
    row = (pid % blocks) * BLOCK
    rows = row + tl.arange(0, BLOCK)
    q_row, q_start, seqlen_q = packed_queries(CuQ, b, h, heads_q, seqlen_q, q_rows, varlen)
    inside = rows < seqlen_q
    q_base = Q + b * q_sb + h * q_sh + q_start * q_ss
    q = load_tile(q_base, row, seqlen_q, q_ss, q_sd, head_dim, q_vec, D, BLOCK) * scale_log2
    q8, q_scale, amax = _quantize_rows(q)
    q_scale = tl.where(amax == float("inf"), float("nan"), q_scale)  # +inf and -inf scores: no softmax exists
    _store_carrier(Q8 + (q_row + rows)[:, None] * D + d[None, :], q8, inside[:, None])
    tl.store(QScale + q_row + rows, q_scale, mask=inside)
    if shift_lse != 0:
        shift = tl.load(KShift + (bh // group) * D + d)  # heads_q is a multiple of group, so batches line up
        tl.store(QShift + q_row + rows, tl.sum(q * shift[None, :], 1), mask=inside)
