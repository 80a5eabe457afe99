# SPDX-License-Identifier: Apache-2.0
"""Attention of the portable family: INT8 Q K^T, then P V in the 16-bit type of the inputs or in FP8 e4m3.

Online softmax in base 2 (FlashAttention-2, arXiv 2307.08691). Scores are exact integers, times the scale of their key
and the scale of their query, into which the pre-pass has folded softmax_scale * log2(e). FP8: P carries the factor 448
in its exponent (SageAttention2, arXiv 2411.10958) and P V goes into the fp32 accumulator once per key block, because
the tensor core's own accumulator keeps fewer bits.

Workspace layouts are those of prepass.py. V is the workspace's copy or, 16-bit and aligned, the caller's own tensor.
"""

import triton
import triton.language as tl
from tiles import store_tile

LN2 = tl.constexpr(0.6931471805599453)
LOG2_448 = tl.constexpr(8.807354922057604)  # e4m3's largest value


@triton.jit
def _attend_block(
    acc, m, l, q, q_scale, k_ptr, k_scale_ptr, v_ptr, start, row, seqlen_k, v_stride,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PV: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys. MASKED blocks hold the end of the keys or the causal diagonal."""
    n = tl.arange(0, BLOCK_N)
    k = tl.load(k_ptr + start * D)  # K8 is padded to a multiple of 128 keys: no mask
    k_scale = tl.load(k_scale_ptr + start + n)
    s = tl.dot(q, k)
    s = s.to(tl.float32) * k_scale[None, :]
    if MASKED:
        keys = start + n[None, :]
        visible = keys < seqlen_k
        if CAUSAL:
            visible = visible & (keys <= row + tl.arange(0, BLOCK_M)[:, None])
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * q_scale)
    m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # infinite K: no finite score so far
    alpha = tl.exp2(m - m_ref)
    if PV == "fp8e4nv":
        m_ref -= LOG2_448
    p = tl.exp2(s * q_scale[:, None] - m_ref[:, None])
    l = l * alpha + tl.sum(p, 1)
    if PV == "fp8e4nv":
        v = tl.load(v_ptr + start)
        p8 = p.to(tl.float8e4nv)
        p8 = tl.reshape(
            tl.permute(tl.reshape(p8, [BLOCK_M, BLOCK_N // 16, 2, 4, 2]), 0, 1, 3, 2, 4), [BLOCK_M, BLOCK_N]
        )
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], [BLOCK_M, D]), tl.dot(p8, v))
    else:
        if MASKED:
            v = tl.load(v_ptr + start * v_stride, mask=(start + n < seqlen_k)[:, None], other=0.0)
            if CAUSAL:  # 0 * inf is NaN: rows that do not see a non-finite V must not meet it
                v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
        else:
            v = tl.load(v_ptr + start * v_stride)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l


@triton.jit
def attention(
    Q8, QScale, QShift, K8, KScale, V, VScale, VFirst, Out, Lse,
    seqlen_q, seqlen_k, seqlen_pad, heads_q, group, head_dim_v,
    v_sb, v_sh, v_ss, o_sb, o_sh, o_ss, o_sd, o_vec, write_lse, shift_lse,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
    PV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. For FP8, V is V^T [B, Hk, D, seqlen_pad]."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    tile = pid % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # longest first
    bh = (pid // tiles).to(tl.int64)
    b = bh // heads_q
    h = bh % heads_q
    bhk = bh // group
    hk = h // group
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < seqlen_q
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)

    q = tl.load(Q8 + bh * seqlen_q * D + rows[:, None] * D + d[None, :], mask=inside[:, None], other=0)
    q_scale = tl.load(QScale + bh * seqlen_q + rows, mask=inside, other=0.0)
    k_ptr = K8 + bhk * seqlen_pad * D + n[None, :] * D + d[:, None]
    k_scale_ptr = KScale + bhk * seqlen_pad
    v_ptr = V + b * v_sb + hk * v_sh
    if PV == "fp8e4nv":
        v_ptr = v_ptr + n[:, None] + d[None, :] * seqlen_pad  # 32 bits: our own buffer
    else:
        v_ptr = v_ptr + n.to(tl.int64)[:, None] * v_ss + d[None, :]

    end = seqlen_k
    unmasked = seqlen_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(seqlen_k, row + BLOCK_M)
        unmasked = tl.minimum(unmasked, (row + 1) // BLOCK_N * BLOCK_N)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        acc, m, l = _attend_block(
            acc, m, l, q, q_scale, k_ptr, k_scale_ptr, v_ptr, start, row, seqlen_k, v_ss,
            D, BLOCK_M, BLOCK_N, PV, CAUSAL, False,
        )  # fmt: skip
    for start in tl.range(unmasked, end, BLOCK_N, num_stages=1):
        acc, m, l = _attend_block(
            acc, m, l, q, q_scale, k_ptr, k_scale_ptr, v_ptr, start, row, seqlen_k, v_ss,
            D, BLOCK_M, BLOCK_N, PV, CAUSAL, True,
        )  # fmt: skip

    if seqlen_k == 0:
        l += 1.0
    acc = acc * (1.0 / l)[:, None]  # l is 0, and the result NaN, where every score is -inf
    if PV == "fp8e4nv":
        acc = acc * tl.load(VScale + bhk * D + d)[None, :]
    if PV == "fp8e4nv" or CAUSAL:
        # V's infinities and NaNs were left out above; each reaches exactly the rows that see its key.
        last = seqlen_k - 1
        if CAUSAL:
            seen = tl.minimum(rows, last)[:, None]
        else:
            seen = tl.full([BLOCK_M, 1], 0, tl.int32) + last
        if seqlen_k > 0:
            first_pos = tl.load(VFirst + 2 * bhk * D + d)
            first_neg = tl.load(VFirst + 2 * bhk * D + D + d)
            acc = tl.where(first_pos[None, :] <= seen, acc + float("inf"), acc)
            acc = tl.where(first_neg[None, :] <= seen, acc + float("-inf"), acc)
    out = acc.to(Out.dtype.element_ty)
    store_tile(Out + b * o_sb + h * o_sh, out, row, seqlen_q, o_ss, o_sd, head_dim_v, o_vec, D, BLOCK_M)
    if write_lse != 0:
        lse = m + tl.log2(l)  # without keys m is -inf
        if PV == "fp8e4nv":
            lse -= LOG2_448
        if shift_lse != 0:
            lse += tl.load(QShift + bh * seqlen_q + rows, mask=inside, other=0.0)
        tl.store(Lse + bh * seqlen_q + rows, lse * LN2, mask=inside)
