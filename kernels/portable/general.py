# SPDX-License-Identifier: Apache-2.0
"""General attention of the portable family: masks, windows, both alignments, packed sequences, any V.

The arithmetic is that of attention.py. What a query sees is decided at run time: the keys low .. high of its position
(causal is a window that ends at the query's own key) and, of those, the ones the mask leaves. Key blocks come in three
kinds, walked one after the other: clean blocks, which every query of the tile sees whole, with nothing to add; masked
blocks, where only the mask matters; edge blocks, which decide key by key. Blocks that nothing sees are not visited:
without a mask the kinds are ranges, with one they are lists that mask.py makes.

A float mask is added in natural-log units, so that the lowest finite value of its type stays finite and means what it
means in exact attention. Workspace layouts are those of prepass.py and mask.py.
"""

import triton
import triton.language as tl
from tiles import key_range, packed_keys, packed_queries, store_tile, visible_keys

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2_448 = tl.constexpr(8.807354922057604)  # e4m3's largest value
LIST_HEAD = tl.constexpr(4)  # counts in front of a list's blocks
MASK_BOOL = tl.constexpr(1)
MASK_IO = tl.constexpr(2)
MASK_FP32 = tl.constexpr(3)
K_BAD = tl.constexpr(2)  # HeadFlags


@triton.jit
def _pair_order(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of x [BLOCK_M, BLOCK_N] in the order in which prepass.py stores the keys of an FP8 V."""
    return tl.reshape(tl.permute(tl.reshape(x, [BLOCK_M, BLOCK_N // 16, 2, 4, 2]), 0, 1, 3, 2, 4), [BLOCK_M, BLOCK_N])


@triton.jit
def _listed(blocks, use_list, i, ranged):
    """Block i of a list, or `ranged` where there is no list."""
    return tl.where(use_list, tl.load(blocks + i, mask=use_list, other=0), ranged)


@triton.jit
def _scores(q, k_ptr, k_scale_ptr, start, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """q times the block's keys, without the queries' scales."""
    k = tl.load(k_ptr + start.to(tl.int64) * D)  # K8 is padded to a multiple of 128 keys: no mask
    k_scale = tl.load(k_scale_ptr + start + tl.arange(0, BLOCK_N))
    return tl.dot(q, k).to(tl.float32) * k_scale[None, :]


@triton.jit
def _add_product(
    acc, alpha, p, v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DV: tl.constexpr, PV_FP8: tl.constexpr
):  # fmt: skip
    if PV_FP8:
        p8 = _pair_order(p.to(tl.float8e4nv), BLOCK_M, BLOCK_N)
        return tl.fma(acc, tl.broadcast_to(alpha[:, None], [BLOCK_M, DV]), tl.dot(p8, v))
    return tl.dot(p.to(v.dtype), v, acc * alpha[:, None])


@triton.jit
def _load_v(v_ptr, start, v_ss, PV_FP8: tl.constexpr):
    if PV_FP8:
        return tl.load(v_ptr + start)
    return tl.load(v_ptr + start.to(tl.int64) * v_ss)


@triton.jit
def _weigh(
    acc, m, l, s, unit, v,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DV: tl.constexpr, PV_FP8: tl.constexpr,
):  # fmt: skip
    """Takes up a block with scores s, a score's weight being 2 ** (unit * s)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen so far
    alpha = tl.exp2((m - m_ref) * unit)
    x = (s - m_ref[:, None]) * unit
    if PV_FP8:
        x += LOG2_448
    p = tl.exp2(x)
    l = l * alpha + tl.sum(p, 1)
    return _add_product(acc, alpha, p, v, BLOCK_M, BLOCK_N, DV, PV_FP8), m_new, l


@triton.jit
def attention(
    Q8, QScale, QShift, K8, KScale, V, VScale, HeadFlags, Out, Lse, CuQ, CuK, Mask8, Mask16, Mask32, Lists,
    seqlen_q, seqlen_k, q_rows, k_rows, heads_q, group, head_dim_v, v_parts, left, right, bottom_right, varlen,
    direct_v, v_sb, v_sh, v_ss, o_sb, o_sh, o_ss, o_sd, o_vec, write_lse, shift_lse,
    mask_kind, m_sb, m_sh, m_ss, list_sb, list_sh, list_size,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MASK_STAGES: tl.constexpr, PV_FP8: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head and DV of its output's channels. For FP8, V is V^T [heads, D, k_rows].

    Where DV is less than D, the accumulator of all channels would not fit the registers: each of v_parts programs has
    scores of its own, and heads whose values are narrower than their keys leave programs out.
    """
    pid = tl.program_id(0)
    v_part = pid % v_parts
    pid = pid // v_parts
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    tile = tiles - 1 - pid % tiles  # where the keys grow with the query, longest first
    bh = pid // tiles
    b = bh // heads_q
    h = bh % heads_q
    hk = h // group
    bhk = bh // group
    q_row, q_start, seqlen_q = packed_queries(CuQ, b, h, heads_q, seqlen_q, q_rows, varlen)
    k_row, k_start, k_pad, seqlen_k = packed_keys(CuK, b, hk, heads_q // group, seqlen_k, k_rows, varlen)
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < seqlen_q
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)

    q = tl.load(Q8 + (q_row + rows)[:, None] * D + d[None, :], mask=inside[:, None], other=0)
    q_scale = tl.load(QScale + q_row + rows, mask=inside, other=0.0)
    k_ptr = K8 + (k_row + k_pad) * D + n[None, :] * D + d[:, None]
    k_scale_ptr = KScale + k_row + k_pad
    if PV_FP8:
        channels = v_part * DV + dv[None, :]
        v_ptr = V + b * v_sb + hk * v_sh + k_pad + (n[:, None] + channels * k_rows)  # 32 bits: our own buffer
    else:
        v_ptr = V + b * v_sb + hk * v_sh + tl.where(direct_v != 0, k_start, k_pad) * v_ss + v_part * DV
        v_ptr = v_ptr + n.to(tl.int64)[:, None] * v_ss + dv[None, :]

    shift = tl.where(bottom_right != 0, seqlen_k - seqlen_q, 0)
    first, clean, clean_end, end = key_range(row, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
    use_list = mask_kind != 0
    is_float = mask_kind > MASK_BOOL
    blocks = Lists + (b * list_sb + h * list_sh + tile) * list_size
    n_clean, n_masked = clean_end - clean, 0
    n_edge = end - first - n_clean
    if use_list:
        n_clean, n_masked, n_edge = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2)
    blocks += LIST_HEAD
    visited = n_clean + n_masked + n_edge
    flags = tl.load(HeadFlags + bhk)
    low_edges = clean - first  # of the edge blocks those in front of the clean ones
    if flags != 0:  # rare: K or V holds infinities or NaN; every block is taken as an edge
        n_clean, n_masked, n_edge, low_edges = 0, 0, visited, visited

    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(0, n_clean, num_stages=STAGES):
        start = _listed(blocks, use_list, i, clean + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N)
        m_new = tl.maximum(m, tl.max(s, 1) * q_scale)
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - m_ref)
        if PV_FP8:
            m_ref -= LOG2_448
        p = tl.exp2(s * q_scale[:, None] - m_ref[:, None])
        l = l * alpha + tl.sum(p, 1)
        acc = _add_product(acc, alpha, p, _load_v(v_ptr, start, v_ss, PV_FP8), BLOCK_M, BLOCK_N, DV, PV_FP8)
        m = m_new

    # From here on a score's unit is that of the mask: the natural logarithm under a float mask, else base 2.
    to_unit = tl.where(is_float, LN2, 1.0)
    unit = tl.where(is_float, LOG2E, 1.0)
    m = m * to_unit
    q_unit = q_scale * to_unit
    mask_base = b * m_sb + h * m_sh + row * m_ss
    # 32 bits: the host copies masks of larger strides.
    mask_rows = (tl.minimum(rows, seqlen_q - 1) - row)[:, None] * m_ss.to(tl.int32)
    blocks += n_clean
    for i in tl.range(0, tl.where(mask_kind == MASK_BOOL, n_masked, 0), num_stages=MASK_STAGES):
        start = tl.load(blocks + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None]
        s = tl.where(tl.load(Mask8 + mask_base + (mask_rows + start + n[None, :])) != 0, s, float("-inf"))
        acc, m, l = _weigh(
            acc, m, l, s, unit, _load_v(v_ptr, start, v_ss, PV_FP8), BLOCK_M, BLOCK_N, DV, PV_FP8
        )  # fmt: skip
    for i in tl.range(0, tl.where(mask_kind == MASK_IO, n_masked, 0), num_stages=MASK_STAGES):
        start = tl.load(blocks + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None]
        s += tl.load(Mask16 + mask_base + (mask_rows + start + n[None, :])).to(tl.float32)
        acc, m, l = _weigh(
            acc, m, l, s, unit, _load_v(v_ptr, start, v_ss, PV_FP8), BLOCK_M, BLOCK_N, DV, PV_FP8
        )  # fmt: skip
    for i in tl.range(0, tl.where(mask_kind == MASK_FP32, n_masked, 0), num_stages=MASK_STAGES):
        start = tl.load(blocks + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None]
        s += tl.load(Mask32 + mask_base + (mask_rows + start + n[None, :]))
        acc, m, l = _weigh(
            acc, m, l, s, unit, _load_v(v_ptr, start, v_ss, PV_FP8), BLOCK_M, BLOCK_N, DV, PV_FP8
        )  # fmt: skip

    blocks += n_masked
    low = rows + (shift - left)
    high = tl.minimum(rows + (shift + right), seqlen_k - 1)
    for i in tl.range(0, n_edge, num_stages=1, disable_licm=True):
        ranged = first + i + tl.where(i >= low_edges, clean_end - clean, 0)
        start = _listed(blocks, use_list, i, ranged) * BLOCK_N
        visible, bias = visible_keys(
            Mask8, Mask16, Mask32, mask_kind, mask_base, mask_rows, start, low, high, seqlen_k, BLOCK_M, BLOCK_N
        )
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None] + bias
        s = tl.where(visible, s, float("-inf"))
        if PV_FP8:
            v = tl.load(v_ptr + start)
        else:
            v = tl.load(v_ptr + start.to(tl.int64) * v_ss, mask=(start + n < seqlen_k)[:, None], other=0.0)
            v = tl.where(tl.abs(v) < float("inf"), v, 0.0)  # 0 * inf is NaN; repair.py adds infinities where seen
        acc, m, l = _weigh(acc, m, l, s, unit, v, BLOCK_M, BLOCK_N, DV, PV_FP8)

    seen = l != 0.0
    # Without weights a row saw no key; or, where K holds an infinity, every score is -inf and no softmax exists:
    # repair.py tells which.
    nothing = tl.where(flags >= K_BAD, float("nan"), 0.0)
    acc = acc * tl.where(seen, 1.0 / l, nothing)[:, None]
    if PV_FP8:
        acc = acc * tl.load(VScale + bhk.to(tl.int64) * D + v_part * DV + dv)[None, :]
    out = acc.to(Out.dtype.element_ty)
    out_base = Out + b * o_sb + h * o_sh + q_start * o_ss + v_part * DV * o_sd
    store_tile(out_base, out, row, seqlen_q, o_ss, o_sd, head_dim_v - v_part * DV, o_vec, DV, BLOCK_M)
    if (write_lse != 0) & (v_part == 0):
        lse = m * tl.where(is_float, 1.0, LN2) + tl.log2(l) * LN2
        if PV_FP8:
            lse -= LOG2_448 * LN2
        if shift_lse != 0:
            lse += tl.load(QShift + q_row + rows, mask=inside, other=0.0) * LN2
        tl.store(Lse + q_row + rows, tl.where(seen, lse, float("-inf")), mask=inside)
