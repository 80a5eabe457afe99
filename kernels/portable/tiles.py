# SPDX-License-Identifier: Apache-2.0
"""Where tiles lie and what they hold: loads and stores of the caller's tensors, packed sequences, visible keys.

Loads and stores of [BLOCK, D] tiles use vectors where the layout allows, elements otherwise. The host promises, by
`vec`, a unit last stride, 16-byte aligned rows and a head dim of exactly D; the pointer hints below pass the promise
on. One kernel then serves every stride, offset and head dim.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(base, row, end, stride_s, stride_d, head_dim, vec, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows row .. row + BLOCK - 1 of a [S, head_dim] matrix as fp32 [BLOCK, D]; 0 from `end` and from head_dim on."""
    rows = row + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    inside = (rows < end)[:, None]
    if vec != 0:
        pointers = base + (rows.to(tl.int64)[:, None] * stride_s + d[None, :])
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, D))
        x = tl.load(pointers, mask=inside, other=0.0)
    else:
        offsets = rows.to(tl.int64)[:, None] * stride_s + d.to(tl.int64)[None, :] * stride_d
        x = tl.load(base + offsets, mask=inside & (d < head_dim)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_tile(base, x, row, end, stride_s, stride_d, head_dim, vec, D: tl.constexpr, BLOCK: tl.constexpr):
    """Writes x [BLOCK, D] to rows row .. of a [S, head_dim] matrix, leaving what lies outside it alone."""
    rows = row + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    inside = (rows < end)[:, None]
    if vec != 0:
        pointers = base + (rows.to(tl.int64)[:, None] * stride_s + d[None, :])
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, D))
        tl.store(pointers, x, mask=inside)
    else:
        offsets = rows.to(tl.int64)[:, None] * stride_s + d.to(tl.int64)[None, :] * stride_d
        tl.store(base + offsets, x, mask=inside & (d < head_dim)[None, :])


@triton.jit
def pair_order(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of x [BLOCK_M, BLOCK_N] in the order in which prepass.py stores the keys of a V of 8 bits.

    Within 16 keys it is the order in which a thread of the score fragment holds them, so that P needs no exchange
    between threads to become the A operand of P V.
    """
    return tl.reshape(tl.permute(tl.reshape(x, [BLOCK_M, BLOCK_N // 16, 2, 4, 2]), 0, 1, 3, 2, 4), [BLOCK_M, BLOCK_N])


@triton.jit
def packed_queries(CuQ, b, h, heads_q, seqlen_q, q_rows, varlen):
    """Row of Q8 and the LSE at which a head's queries start, the row of Q at which they do, and how many they are.

    Equal lengths: rows are [B, H, S], and Q has a batch stride. Packed sequences: rows are [H, q_rows].
    """
    first = (b * heads_q + h).to(tl.int64) * q_rows
    start = first * 0
    if varlen != 0:
        start = tl.load(CuQ + b).to(tl.int64)
        # No longer than the caller said, whatever cu_seqlens holds: the grids end there.
        seqlen_q = tl.minimum((tl.load(CuQ + b + 1) - start).to(tl.int32), seqlen_q)
        first = h.to(tl.int64) * q_rows + start
    return first, start, seqlen_q


@triton.jit
def packed_keys(CuK, b, hk, heads_kv, seqlen_k, k_rows, varlen):
    """A head's first row of K8 less its sequence's, the sequence's row in K, its row in K8, and its number of keys.

    Equal lengths: rows of K8 are [B, Hk, k_rows]. Packed sequences: [Hk, k_rows], where sequence b starts at a multiple
    of 128 that leaves room for every sequence before it: no prefix sum over padded lengths is needed.
    """
    first = (b * heads_kv + hk).to(tl.int64) * k_rows
    start = first * 0
    padded = start
    if varlen != 0:
        start = tl.load(CuK + b).to(tl.int64)
        seqlen_k = tl.minimum((tl.load(CuK + b + 1) - start).to(tl.int32), seqlen_k)
        first = hk.to(tl.int64) * k_rows
        padded = (start // 128 + b) * 128
    return first, start, padded, seqlen_k


@triton.jit
def key_range(row, seqlen_q, seqlen_k, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of keys of a tile of queries: first, first clean, end of the clean, end; first <= .. <= end.

    Query i sees the keys i + shift - left .. i + shift + right. A clean block is seen whole by every query of the tile.
    """
    last_row = tl.minimum(row + BLOCK_M, seqlen_q) - 1
    first_key = tl.maximum(row + shift - left, 0)
    last_key = tl.minimum(last_row + shift + right, seqlen_k - 1)
    first = first_key // BLOCK_N
    end = tl.where((first_key <= last_key) & (row < seqlen_q), last_key // BLOCK_N + 1, first)
    clean = tl.cdiv(tl.maximum(last_row + shift - left, 0), BLOCK_N)
    clean_end = tl.maximum(tl.minimum(row + shift + right + 1, seqlen_k), 0) // BLOCK_N
    clean = tl.minimum(tl.maximum(clean, first), end)
    clean_end = tl.minimum(tl.maximum(clean_end, clean), end)
    return first, clean, clean_end, end


@triton.jit
def visible_keys(
    Mask8, Mask16, Mask32, mask_kind, mask_base, mask_rows, start, low, high, seqlen_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which of a block's keys each query sees [BLOCK_M, BLOCK_N], and what a float mask adds to the scores."""
    keys = (start + tl.arange(0, BLOCK_N))[None, :]
    visible = (keys >= low[:, None]) & (keys <= high[:, None])
    bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    exists = keys // 16 < tl.cdiv(seqlen_k, 16)  # rows of a mask that attention reads end at a multiple of 16
    cells = mask_rows + keys
    if mask_kind == 1:
        visible = visible & (tl.load(Mask8 + mask_base + cells, mask=exists, other=0) != 0)
    elif mask_kind == 2:
        bias = tl.load(Mask16 + mask_base + cells, mask=exists, other=0.0).to(tl.float32)
        visible = visible & (bias != float("-inf"))
    elif mask_kind == 3:
        bias = tl.load(Mask32 + mask_base + cells, mask=exists, other=0.0)
        visible = visible & (bias != float("-inf"))
    return visible, bias
