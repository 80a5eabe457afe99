# SPDX-License-Identifier: Apache-2.0
"""Infinities and NaN of V and K, after general.py has left them out: each reaches exactly the queries that see its key.

Heads without any, all heads as a rule, cost one look at their flag.
"""

import triton
import triton.language as tl
from tiles import key_range, packed_keys, packed_queries, pair_order, visible_keys

V_BAD = tl.constexpr(1)  # HeadFlags


@triton.jit
def _infinite(v, negative: tl.constexpr):
    """1 where V, as stored, is an infinity of this sign or NaN."""
    if v.dtype == tl.int8:  # see quantize_values of integers.py
        found = (v == -128) | (v == (-127 if negative else 127))
    elif v.dtype == tl.float8e4nv:  # see _mark_nonfinite of prepass.py
        bits = v.to(tl.uint8, bitcast=True)
        found = (bits == 0x80) | (bits == (0xFE if negative else 0x7E))
    else:
        found = (v != v) | (v == (float("-inf") if negative else float("inf")))
    return tl.where(found, 1.0, 0.0).to(tl.float16)


@triton.jit
def repair(
    V, HeadFlags, Out, CuQ, CuK, Mask8, Mask16, Mask32,
    seqlen_q, seqlen_k, q_rows, k_rows, heads_q, group, head_dim_v, left, right, bottom_right, varlen, direct_v,
    v_sb, v_sh, v_ss, o_sb, o_sh, o_ss, o_sd, mask_kind, m_sb, m_sh, m_ss, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """Every parts-th tile of one head. Parameters as in general.attention."""
    TRANSPOSED: tl.constexpr = PV == "i8" or PV == "fp8e4nv"
    pid = tl.program_id(0)
    bh = (pid // parts).to(tl.int64)
    b = bh // heads_q
    h = bh % heads_q
    hk = h // group
    flags = tl.load(HeadFlags + bh // group)
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    if flags == 0:
        tiles = 0
    _q_row, q_start, seqlen_q = packed_queries(CuQ, b, h, heads_q, seqlen_q, q_rows, varlen)
    _k_row, k_start, k_pad, seqlen_k = packed_keys(CuK, b, hk, heads_q // group, seqlen_k, k_rows, varlen)
    n = tl.arange(0, BLOCK_N)
    # V of 8 bits lies in pair order; taking 16-bit V in the same makes one product of both.
    in_pairs = n // 16 * 16 + n // 2 % 2 * 8 + n % 16 // 4 * 2 + n % 2
    v_base = V + b * v_sb + hk * v_sh
    if TRANSPOSED:
        v_base += k_pad
    else:
        v_base += tl.where(direct_v != 0, k_start, k_pad) * v_ss
    shift = tl.where(bottom_right != 0, seqlen_k - seqlen_q, 0)
    for tile in tl.range(pid % parts, tiles, parts, num_stages=1):
        row = tile * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        low = rows + (shift - left)
        high = tl.minimum(rows + (shift + right), seqlen_k - 1)
        mask_base = b * m_sb + h * m_sh + row * m_ss
        mask_rows = (tl.minimum(rows, seqlen_q - 1) - row)[:, None] * m_ss.to(tl.int32)
        first, _clean, _clean_end, end = key_range(row, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
        for d_first in tl.range(0, head_dim_v, BLOCK_D, num_stages=1):
            d = d_first + tl.arange(0, BLOCK_D)
            sees = tl.zeros([BLOCK_M], tl.int32)
            positive = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            negative = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            inside = (rows < seqlen_q)[:, None] & (d < head_dim_v)[None, :]
            block = first
            open_cells = 1
            while (block < end) & (open_cells != 0):  # until every output is known to be NaN
                start = block * BLOCK_N
                visible, _bias = visible_keys(
                    Mask8, Mask16, Mask32, mask_kind, mask_base, mask_rows, start, low, high, seqlen_k,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
                sees = tl.maximum(sees, tl.max(visible.to(tl.int32), 1))
                exists = (d < head_dim_v)[None, :]
                if TRANSPOSED:  # padded: seqlen_k bounds no positions
                    positions = (start + n)[:, None].to(tl.int64)
                    v = tl.load(v_base + positions + d.to(tl.int64)[None, :] * k_rows, mask=exists, other=0.0)
                else:
                    keys = (start + in_pairs)[:, None].to(tl.int64)
                    v = tl.load(v_base + keys * v_ss + d[None, :], mask=exists & (keys < seqlen_k), other=0.0)
                weight = pair_order(tl.where(visible, 1.0, 0.0).to(tl.float16), BLOCK_M, BLOCK_N)
                positive = tl.dot(weight, _infinite(v, False), positive)
                negative = tl.dot(weight, _infinite(v, True), negative)
                is_open = inside & ((positive == 0.0) | (negative == 0.0))
                open_cells = tl.max(tl.max(is_open.to(tl.int32), 1), 0)
                block += 1
            out = Out + b * o_sb + h * o_sh + (q_start + rows.to(tl.int64))[:, None] * o_ss + d[None, :] * o_sd
            x = tl.load(out, mask=inside, other=0.0).to(tl.float32)
            if (flags & V_BAD) != 0:  # else nothing is marked, and what looks like marks are values
                x = tl.where(positive > 0.0, x + float("inf"), x)
                x = tl.where(negative > 0.0, x + float("-inf"), x)
            x = tl.where((sees != 0)[:, None], x, 0.0)
            tl.store(out, x.to(Out.dtype.element_ty), mask=inside)
