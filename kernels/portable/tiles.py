# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of [BLOCK, D] tiles of the caller's tensors: vectors where the layout allows, elements otherwise.

The host promises, by `vec`, a unit last stride, 16-byte aligned rows and a head dim of exactly D; the pointer hints
below pass the promise on. One kernel then serves every stride, offset and head dim.
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
