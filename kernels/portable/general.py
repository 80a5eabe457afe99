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
from integers import LOG2_255, V_BLOCK, weigh_bytes
from tiles import key_range, packed_keys, packed_queries, pair_order, store_tile, visible_keys

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2_448 = tl.constexpr(8.807354922057604)  # e4m3's largest value
LIST_HEAD = tl.constexpr(4)  # counts in front of a list's blocks
MASK_BOOL = tl.constexpr(1)
MASK_IO = tl.constexpr(2)
MASK_FP32 = tl.constexpr(3)
K_BAD = tl.constexpr(2)  # HeadFlags


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
def _add_product(acc, alpha, p, v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DV: tl.constexpr, PV: tl.constexpr):
    if PV == "fp8e4nv":
        p8 = pair_order(p.to(tl.float8e4nv), BLOCK_M, BLOCK_N)
        return tl.fma(acc, tl.broadcast_to(alpha[:, None], [BLOCK_M, DV]), tl.dot(p8, v))
    return tl.dot(p.to(v.dtype), v, acc * alpha[:, None])


@triton.jit
def _load_v(v_ptr, start, v_ss, v_part, PARTS: tl.constexpr, PV: tl.constexpr):
    """V's tile, a tuple of PARTS parts whose channels lie v_part elements apart (Triton cannot unpack tuples)."""
    if PV == "fp8e4nv" or PV == "i8":
        pointers = v_ptr + start
    else:
        pointers = v_ptr + start.to(tl.int64) * v_ss
    v = ()
    for i in tl.static_range(PARTS):
        v = v + (tl.load(pointers + i * v_part),)  # noqa: RUF005
    return v


@triton.jit
def _load_finite(pointers, exists, v_part, PARTS: tl.constexpr):
    """The same of 16-bit V with 0 for infinities, since 0 * inf is NaN; repair.py adds them where they are seen."""
    v = ()
    for i in tl.static_range(PARTS):
        x = tl.load(pointers + i * v_part, mask=exists, other=0.0)
        v = v + (tl.where(tl.abs(x) < float("inf"), x, 0.0),)  # noqa: RUF005
    return v


@triton.jit
def _weigh(
    acc, m, base, l, total, s, unit, v, scale_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """Takes up a block with scores s, a score's weight being 2 ** (unit * s)."""
    if PV == "i8" or PV == "fp16":
        ones = tl.full([BLOCK_M], 1.0, tl.float32)
        acc, m, base, l, total = weigh_bytes(
            acc, m, base, l, total, s, ones, unit, v, scale_ptr, BLOCK_M, BLOCK_N, D, DV
        )  # fmt: skip
    else:
        m_new = tl.maximum(m, tl.max(s, 1))
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen so far
        alpha = tl.exp2((m - m_ref) * unit)
        x = (s - m_ref[:, None]) * unit
        if PV == "fp8e4nv":
            x += LOG2_448
        p = tl.exp2(x)
        l = l * alpha + tl.sum(p, 1)
        acc = (_add_product(acc[0], alpha, p, v[0], BLOCK_M, BLOCK_N, DV, PV),)
        m = m_new
    return acc, m, base, l, total


@triton.jit
def attention(
    Q8, QScale, QShift, K8, KScale, V, VScale, HeadFlags, Out, Lse, CuQ, CuK, Mask8, Mask16, Mask32, Lists,
    seqlen_q, seqlen_k, q_rows, k_rows, heads_q, group, head_dim_v, v_parts, left, right, bottom_right, varlen,
    direct_v, v_sb, v_sh, v_ss, o_sb, o_sh, o_ss, o_sd, o_vec, write_lse, shift_lse,
    mask_kind, m_sb, m_sh, m_ss, list_sb, list_sh, list_size,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MASK_STAGES: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head and DV of its output's channels. V of 8 bits is V^T [heads, D, k_rows].

    PV "io" is P V in the inputs' type, "fp8e4nv" in that; "i8" is in integers, and "fp16" too, which carries them.

    Where DV is less than D, the accumulator of all channels would not fit the registers: each of v_parts programs has
    scores of its own, and heads whose values are narrower than their keys leave programs out.
    """
    IS_INTEGER: tl.constexpr = PV == "i8" or PV == "fp16"
    TRANSPOSED: tl.constexpr = PV == "i8" or PV == "fp8e4nv"
    PART: tl.constexpr = 64 if IS_INTEGER else DV
    PARTS: tl.constexpr = DV // PART
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
    dv = tl.arange(0, PART)

    q = tl.load(Q8 + (q_row + rows)[:, None] * D + d[None, :], mask=inside[:, None], other=0)
    q_scale = tl.load(QScale + q_row + rows, mask=inside, other=0.0)
    k_ptr = K8 + (k_row + k_pad) * D + n[None, :] * D + d[:, None]
    k_scale_ptr = KScale + k_row + k_pad
    if TRANSPOSED:
        channels = v_part * DV + dv[None, :]
        v_ptr = V + b * v_sb + hk * v_sh + k_pad + (n[:, None] + channels * k_rows)  # 32 bits: our own buffer
        v_next = PART * k_rows
    else:
        v_ptr = V + b * v_sb + hk * v_sh + tl.where(direct_v != 0, k_start, k_pad) * v_ss + v_part * DV
        v_ptr = v_ptr + n.to(tl.int64)[:, None] * v_ss + dv[None, :]
        v_next = PART

    scale_ptr = VScale + bhk.to(tl.int64) * D + v_part * DV
    if IS_INTEGER:
        tl.static_assert(BLOCK_N == V_BLOCK)
        scale_ptr = VScale + (k_row + k_pad) // V_BLOCK * (2 * D) + v_part * DV

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

    acc = ()
    for _ in tl.static_range(PARTS):
        acc = acc + (tl.zeros([BLOCK_M, PART], tl.float32),)  # noqa: RUF005
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    base, total = m, l  # of P V in integers alone, see integers.py
    for i in tl.range(0, n_clean, num_stages=STAGES):
        start = _listed(blocks, use_list, i, clean + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N)
        if IS_INTEGER:
            acc, m, base, l, total = weigh_bytes(
                acc, m, base, l, total, s, q_scale, 1.0, _load_v(v_ptr, start, v_ss, v_next, PARTS, PV),
                scale_ptr + start // V_BLOCK * (2 * D), BLOCK_M, BLOCK_N, D, PART,
            )  # fmt: skip
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * q_scale)
            m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m - m_ref)
            if PV == "fp8e4nv":
                m_ref -= LOG2_448
            p = tl.exp2(s * q_scale[:, None] - m_ref[:, None])
            l = l * alpha + tl.sum(p, 1)
            v = _load_v(v_ptr, start, v_ss, v_next, PARTS, PV)
            acc = (_add_product(acc[0], alpha, p, v[0], BLOCK_M, BLOCK_N, PART, PV),)
            m = m_new

    # From here on a score's unit is that of the mask: the natural logarithm under a float mask, else base 2.
    to_unit = tl.where(is_float, LN2, 1.0)
    unit = tl.where(is_float, LOG2E, 1.0)
    m = m * to_unit
    base = base * to_unit
    q_unit = q_scale * to_unit
    mask_base = b * m_sb + h * m_sh + row * m_ss
    # 32 bits: the host copies masks of larger strides.
    mask_rows = (tl.minimum(rows, seqlen_q - 1) - row)[:, None] * m_ss.to(tl.int32)
    blocks += n_clean
    for i in tl.range(0, tl.where(mask_kind == MASK_BOOL, n_masked, 0), num_stages=MASK_STAGES):
        start = tl.load(blocks + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None]
        s = tl.where(tl.load(Mask8 + mask_base + (mask_rows + start + n[None, :])) != 0, s, float("-inf"))
        acc, m, base, l, total = _weigh(
            acc, m, base, l, total, s, unit, _load_v(v_ptr, start, v_ss, v_next, PARTS, PV),
            scale_ptr + start // V_BLOCK * (2 * D), BLOCK_M, BLOCK_N, D, PART, PV,
        )  # fmt: skip
    for i in tl.range(0, tl.where(mask_kind == MASK_IO, n_masked, 0), num_stages=MASK_STAGES):
        start = tl.load(blocks + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None]
        s += tl.load(Mask16 + mask_base + (mask_rows + start + n[None, :])).to(tl.float32)
        acc, m, base, l, total = _weigh(
            acc, m, base, l, total, s, unit, _load_v(v_ptr, start, v_ss, v_next, PARTS, PV),
            scale_ptr + start // V_BLOCK * (2 * D), BLOCK_M, BLOCK_N, D, PART, PV,
        )  # fmt: skip
    for i in tl.range(0, tl.where(mask_kind == MASK_FP32, n_masked, 0), num_stages=MASK_STAGES):
        start = tl.load(blocks + i) * BLOCK_N
        s = _scores(q, k_ptr, k_scale_ptr, start, D, BLOCK_N) * q_unit[:, None]
        s += tl.load(Mask32 + mask_base + (mask_rows + start + n[None, :]))
        acc, m, base, l, total = _weigh(
            acc, m, base, l, total, s, unit, _load_v(v_ptr, start, v_ss, v_next, PARTS, PV),
            scale_ptr + start // V_BLOCK * (2 * D), BLOCK_M, BLOCK_N, D, PART, PV,
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
        if TRANSPOSED:
            v = _load_v(v_ptr, start, v_ss, v_next, PARTS, PV)
        else:
            v = _load_finite(v_ptr + start.to(tl.int64) * v_ss, (start + n < seqlen_k)[:, None], v_next, PARTS)
        acc, m, base, l, total = _weigh(
            acc, m, base, l, total, s, unit, v, scale_ptr + start // V_BLOCK * (2 * D), BLOCK_M, BLOCK_N, D, PART, PV
        )  # fmt: skip

    seen = l != 0.0
    # Without weights a row saw no key; or, where K holds an infinity, every score is -inf and no softmax exists:
    # repair.py tells which.
    nothing = tl.where(flags >= K_BAD, float("nan"), 0.0)
    if IS_INTEGER:  # the sum of rounded weights, but for NaN, which bytes cannot hold
        inverse = tl.where(seen, tl.where(l == l, 1.0 / total, float("nan")), nothing)
    else:
        inverse = tl.where(seen, 1.0 / l, nothing)
    out_base = Out + b * o_sb + h * o_sh + q_start * o_ss
    for i in tl.static_range(PARTS):
        channel = v_part * DV + i * PART
        x = acc[i] * inverse[:, None]
        if PV == "fp8e4nv":
            x = x * tl.load(scale_ptr + dv)[None, :]
        x = x.to(Out.dtype.element_ty)
        out = out_base + channel * o_sd
        store_tile(out, x, row, seqlen_q, o_ss, o_sd, head_dim_v - channel, o_vec, PART, BLOCK_M)
    if (write_lse != 0) & (v_part == 0):
        lse = (base if IS_INTEGER else m) * tl.where(is_float, 1.0, LN2) + tl.log2(l) * LN2
        if PV == "fp8e4nv":
            lse -= LOG2_448 * LN2
        if IS_INTEGER:
            lse -= LOG2_255 * LN2
        if shift_lse != 0:
            lse += tl.load(QShift + q_row + rows, mask=inside, other=0.0) * LN2
        tl.store(Lse + q_row + rows, tl.where(seen, lse, float("-inf")), mask=inside)
