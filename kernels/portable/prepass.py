# SPDX-License-Identifier: Apache-2.0
"""Pre-pass of the portable family: K shift, INT8 Q and K, V in the form P V reads.

Workspace buffers are contiguous, padded to D (64 or 128) channels, and K and V to a multiple of 128 keys:
  KSum, VAmax fp32 [B*Hk, parts, D], VBad i32 [B*Hk, parts, 2, D]   partial statistics
  KShift fp32 [B*Hk, D]; K8 [B*Hk, seqlen_pad, D]; KScale fp32 [B*Hk, seqlen_pad]
  VOut e4m3 [B*Hk, D, seqlen_pad] in pair order, or 16-bit [B*Hk, seqlen_pad, D]; VScale fp32 [B*Hk, D]
  VFirst i32 [B*Hk, 2, D]   first key whose V is +inf or NaN, -inf or NaN
  Q8 [B*H, S, D]; QScale, QShift fp32 [B*H, S]

INT8 uses one scale per row of Q and of K (SageAttention2, arXiv 2411.10958, smooths K the same way; its groups are
larger). A row of K that holds an infinity becomes +-127 at the infinities with scale inf, one that holds a NaN gets
scale NaN, so that its scores are what exact attention gives.
"""

import triton
import triton.language as tl
from tiles import load_tile

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
def kv_stats(
    K, V, KSum, VAmax, VBad,
    seqlen_k, heads_kv, parts, part_rows, head_dim, head_dim_v,
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
    k_base = K + b * k_sb + h * k_sh
    v_base = V + b * v_sb + h * v_sh
    first_row = part * part_rows
    last_row = tl.minimum(first_row + part_rows, seqlen_k)
    offset = (bh.to(tl.int64) * parts + part) * D

    sums = tl.zeros([BLOCK, D], tl.float32)
    amax = tl.zeros([BLOCK, D], tl.float32)
    for row in tl.range(first_row, last_row, BLOCK, num_stages=3):
        sums += load_tile(k_base, row, last_row, k_ss, k_sd, head_dim, k_vec, D, BLOCK)
        if V_STATS > 0:
            v = load_tile(v_base, row, last_row, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
            amax = _nan_max(amax, tl.abs(v))
    k_sum = tl.sum(sums, 0)
    v_amax = tl.reduce(amax, 0, _nan_max)
    if tl.max((~_is_finite(k_sum)).to(tl.int32), 0) > 0:  # rare: leave non-finite keys out
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
    K, V, KSum, VAmax, VBad, KShift, K8, KScale, VOut, VScale, VFirst,
    seqlen_k, seqlen_pad, heads_kv, parts, head_dim, head_dim_v, smooth_k, copy_v,
    k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, k_vec, v_vec,
    D: tl.constexpr, BLOCK: tl.constexpr, V_STATS: tl.constexpr, PV_FP8: tl.constexpr,
):  # fmt: skip
    """One block of keys: reduces the partial statistics, then writes K8 and, as PV_FP8 or copy_v ask, V."""
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

    shift = tl.zeros([D], tl.float32)
    if smooth_k != 0:
        shift = tl.sum(tl.load(KSum + partial, mask=has_part, other=0.0), 0) / seqlen_k.to(tl.float32)
        shift = tl.where(_is_finite(shift), shift, 0.0)
    if block == 0:
        tl.store(KShift + bh * D + d, shift)

    k = load_tile(K + b * k_sb + h * k_sh, row, seqlen_k, k_ss, k_sd, head_dim, k_vec, D, BLOCK)
    k = tl.where((rows < seqlen_k)[:, None], k - shift[None, :], 0.0)
    k8, k_scale, _ = _quantize_rows(k)
    _store_carrier(K8 + bh * seqlen_pad * D + rows[:, None] * D + d[None, :], k8, None)
    tl.store(KScale + bh * seqlen_pad + rows, k_scale)

    if V_STATS > 0:
        if block == 0:
            bad = VBad + (2 * partial - d[None, :])  # [parts, 2, D]
            tl.store(VFirst + 2 * bh * D + d, tl.min(tl.load(bad, mask=has_part, other=NEVER), 0))
            tl.store(VFirst + 2 * bh * D + D + d, tl.min(tl.load(bad + D, mask=has_part, other=NEVER), 0))

    v_base = V + b * v_sb + h * v_sh
    if PV_FP8:
        amax = tl.max(tl.load(VAmax + partial, mask=has_part, other=0.0), 0)
        zero = amax < TINY
        if block == 0:
            tl.store(VScale + bh * D + d, tl.where(zero, 1.0, amax * (1.0 / 448.0)))
        inv = tl.where(zero, 0.0, 448.0 / tl.where(zero, 1.0, amax))
        v = load_tile(v_base, row, seqlen_k, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
        v = tl.where(_is_finite(v), v, 0.0) * inv[None, :]
        v8 = tl.trans(tl.minimum(tl.maximum(v, -448.0), 448.0).to(tl.float8e4nv))
        # Pair order: within 16 keys, the order in which a thread of the score fragment holds them, so that P needs
        # no exchange between threads to become the A operand of P V.
        v8 = tl.reshape(tl.permute(tl.reshape(v8, [D, BLOCK // 16, 2, 4, 2]), 0, 1, 3, 2, 4), [D, BLOCK])
        tl.store(VOut + bh * D * seqlen_pad + d[:, None] * seqlen_pad + rows[None, :], v8)
    elif copy_v != 0:
        v = load_tile(v_base, row, seqlen_k, v_ss, v_sd, head_dim_v, v_vec, D, BLOCK)
        tl.store(VOut + bh * seqlen_pad * D + rows[:, None] * D + d[None, :], v.to(VOut.dtype.element_ty))


@triton.jit
def quantize_q(
    Q, KShift, Q8, QScale, QShift,
    scale_log2, seqlen_q, heads_q, group, head_dim, q_sb, q_sh, q_ss, q_sd, q_vec, shift_lse,
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
    inside = rows < seqlen_q
    q = load_tile(Q + b * q_sb + h * q_sh, row, seqlen_q, q_ss, q_sd, head_dim, q_vec, D, BLOCK) * scale_log2
    q8, q_scale, amax = _quantize_rows(q)
    q_scale = tl.where(amax == float("inf"), float("nan"), q_scale)  # +inf and -inf scores: no softmax exists
    _store_carrier(Q8 + bh * seqlen_q * D + rows[:, None] * D + d[None, :], q8, inside[:, None])
    tl.store(QScale + bh * seqlen_q + rows, q_scale, mask=inside)
    if shift_lse != 0:
        shift = tl.load(KShift + (bh // group) * D + d)  # heads_q is a multiple of group, so batches line up
        tl.store(QShift + bh * seqlen_q + rows, tl.sum(q * shift[None, :], 1), mask=inside)
