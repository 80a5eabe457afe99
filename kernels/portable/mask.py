# SPDX-License-Identifier: Apache-2.0
"""Masks of the general kernels: which key blocks a tile of queries needs at all, and a copy that vectors can read.

A mask is read once for every batch entry and head in which it differs; a stride of 0 makes them one. Buffers:
  Classes u8 [masks, tiles, blocks]         what a block of keys is to a tile of queries, see below
  Lists i32 [masks, tiles, 4 + blocks]      counts of clean, masked and edge blocks, then the blocks themselves
  Copy [masks, S, row stride] of the type attention reads, where the caller's layout or type does not do
"""

import triton
import triton.language as tl
from tiles import key_range

SKIP = tl.constexpr(0)  # no query sees any of its keys
CLEAN = tl.constexpr(1)  # all queries see all of them, and nothing is added
MASKED = tl.constexpr(2)  # all keys lie within every query's window: only the mask matters
EDGE = tl.constexpr(3)  # holds an end of a window or of the keys
LIST_HEAD = tl.constexpr(4)
ROWS = tl.constexpr(32)  # of a tile, looked at at a time
BOOL = tl.constexpr(4)  # SAGERT_DTYPE_*
FP16 = tl.constexpr(1)
BF16 = tl.constexpr(2)


@triton.jit
def _values(base, offsets, inside, vec, BLOCK_N: tl.constexpr):
    """Mask values, 0 outside. vec: 16-byte aligned rows with a unit stride."""
    if vec != 0:
        pointers = tl.max_contiguous(tl.multiple_of(base + offsets, (1, 16)), (1, BLOCK_N))
        x = tl.load(pointers, mask=inside, other=0.0)
    else:
        x = tl.load(base + offsets, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def scan_mask(
    Mask8, MaskF16, MaskBF16, Mask32, Classes, Copy8, Copy16, Copy32,
    mask_dtype, seqlen_q, seqlen_k, tiles, blocks, chunks, chunk, heads, left, right, bottom_right,
    m_sb, m_sh, m_ss, m_sk, mask_vec, copy_mask, c_sm, c_ss,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Classifies `chunk` key blocks of one tile of one mask; copy_mask 1: copies them as they are, 2: to fp32."""
    pid = tl.program_id(0)
    part = pid % chunks
    tile = (pid // chunks) % tiles
    mask = (pid // chunks // tiles).to(tl.int64)
    base = (mask // heads) * m_sb + (mask % heads) * m_sh
    row = tile * BLOCK_M
    shift = tl.where(bottom_right != 0, seqlen_k - seqlen_q, 0)
    first, clean, clean_end, end = key_range(row, seqlen_q, seqlen_k, shift, left, right, BLOCK_M, BLOCK_N)
    classes = Classes + (mask * tiles + tile) * blocks
    for block in range(part * chunk, tl.minimum(part * chunk + chunk, blocks)):
        any_visible = block * 0
        all_plain = any_visible + 1
        last = row
        if (block >= first) & (block < end):
            last = tl.minimum(row + BLOCK_M, seqlen_q)
        keys = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        for top in range(row, last, ROWS):
            rows = (top + tl.arange(0, ROWS))[:, None]
            inside = (rows < last) & (keys < seqlen_k)
            offsets = base + rows.to(tl.int64) * m_ss + keys.to(tl.int64) * m_sk
            if mask_dtype == BOOL:
                x = tl.where(_values(Mask8, offsets, inside, mask_vec, BLOCK_N) != 0.0, 0.0, float("-inf"))
            elif mask_dtype == FP16:
                x = _values(MaskF16, offsets, inside, mask_vec, BLOCK_N)
            elif mask_dtype == BF16:
                x = _values(MaskBF16, offsets, inside, mask_vec, BLOCK_N)
            else:
                x = _values(Mask32, offsets, inside, mask_vec, BLOCK_N)
            visible = inside & (keys >= rows + (shift - left)) & (keys <= rows + (shift + right)) & (x != float("-inf"))
            plain = tl.where(inside, x, 0.0) == 0.0
            any_visible = tl.maximum(any_visible, tl.max(tl.max(visible.to(tl.int32), 1), 0))
            all_plain = tl.minimum(all_plain, tl.min(tl.min(plain.to(tl.int32), 1), 0))
            if copy_mask != 0:
                cells = mask * c_sm + rows.to(tl.int64) * c_ss + keys
                kept = inside & tl.where(c_ss != 0, rows >= row, rows == row)  # rows that are all one are copied once
                if copy_mask == 2:
                    tl.store(Copy32 + cells, x, mask=kept)
                elif mask_dtype == BOOL:
                    tl.store(Copy8 + cells, (x == 0.0).to(tl.uint8), mask=kept)
                elif mask_dtype <= BF16:
                    tl.store(Copy16 + cells, x.to(Copy16.dtype.element_ty), mask=kept)
                else:
                    tl.store(Copy32 + cells, x, mask=kept)
        interior = (block >= clean) & (block < clean_end)
        kind = tl.where(interior, tl.where(all_plain != 0, CLEAN, MASKED), EDGE)
        kind = tl.where(any_visible != 0, kind, SKIP)
        tl.store(classes + block, kind.to(tl.uint8))


@triton.jit
def list_blocks(Classes, Lists, blocks, list_size, CHUNK: tl.constexpr):
    """One tile of one mask: sorts its blocks by class, each class in ascending order."""
    pid = tl.program_id(0).to(tl.int64)
    classes = Classes + pid * blocks
    out = Lists + pid * list_size
    n = tl.arange(0, CHUNK)
    n_clean = 0
    n_masked = 0
    n_edge = 0
    for start in range(0, blocks, CHUNK):
        kind = tl.load(classes + start + n, mask=start + n < blocks, other=0)
        n_clean += tl.sum((kind == CLEAN).to(tl.int32), 0)
        n_masked += tl.sum((kind == MASKED).to(tl.int32), 0)
        n_edge += tl.sum((kind == EDGE).to(tl.int32), 0)
    tl.store(out, n_clean)
    tl.store(out + 1, n_masked)
    tl.store(out + 2, n_edge)
    at_clean = LIST_HEAD + 0
    at_masked = LIST_HEAD + n_clean
    at_edge = at_masked + n_masked
    for start in range(0, blocks, CHUNK):
        kind = tl.load(classes + start + n, mask=start + n < blocks, other=0)
        is_clean = (kind == CLEAN).to(tl.int32)
        is_masked = (kind == MASKED).to(tl.int32)
        is_edge = (kind == EDGE).to(tl.int32)
        place = tl.where(kind == CLEAN, at_clean + tl.cumsum(is_clean, 0), at_masked + tl.cumsum(is_masked, 0))
        place = tl.where(kind == EDGE, at_edge + tl.cumsum(is_edge, 0), place) - 1
        tl.store(out + place, start + n, mask=kind != SKIP)
        at_clean += tl.sum(is_clean, 0)
        at_masked += tl.sum(is_masked, 0)
        at_edge += tl.sum(is_edge, 0)
