# SPDX-License-Identifier: Apache-2.0
"""P V in integers: P in unsigned bytes, V in signed bytes, their products summed exactly over a block of keys.

A query's bytes are its weights relative to the largest one in the block, so that a block far below the row's maximum
keeps its digits; V has one scale per block of keys and channel. No tensor core that Triton reaches multiplies unsigned
by signed bytes: P - 128 stands for P, and 128 times the sum of V over the block is added afterwards. Where tensor cores
have no INT8, fp16 carries both factors, the same integers, whose products and sums stay below 2**24.

VScale fp32 [rows of V / 64, 2, D]: scales, then what P - 128 leaves out, 128 times the sums of the scaled bytes.
"""

import triton
import triton.language as tl
from tiles import pair_order

V_BLOCK = tl.constexpr(64)  # keys of a scale
V_MAX = tl.constexpr(126.0)  # 127, -127 and -128 stand for +inf, -inf and NaN
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: in a sum with it, a number rounds half to even to an integer
BYTE = tl.constexpr(12582784.0)  # ROUND - 128: the low byte of such a sum is P - 128
BYTE_BITS = tl.constexpr(0x4B3FFF80)
LOG2_255 = tl.constexpr(7.994353436858858)
# Blocks whose maximum lies further below the row's lose digits of their bytes, beyond what fp32 sums keep: relative to
# such a block's own maximum, sums of the blocks before would overflow.
SPAN = tl.constexpr(40.0)
TINY = tl.constexpr(1.0e-30)


@triton.jit
def quantize_values(v, MARKS: tl.constexpr):
    """INT8 values (as fp32) of v [V_BLOCK, D]; by channel their scale and 128 times their sum.

    Infinities and NaN become marks, or 0 where attention leaves them out of the products.
    """
    finite = tl.where(tl.abs(v) < float("inf"), v, 0.0)
    amax = tl.max(tl.abs(finite), 0)
    zero = amax < TINY
    inverse = tl.where(zero, 0.0, V_MAX / tl.where(zero, 1.0, amax))
    scale = tl.where(zero, 1.0, amax * (1.0 / V_MAX))
    y = (finite * inverse[None, :] + ROUND) - ROUND
    if MARKS:
        y = tl.where(v == float("inf"), 127.0, tl.where(v == float("-inf"), -127.0, y))
        y = tl.where(v == v, y, -128.0)
    return y, scale, 128.0 * tl.sum(y, 0) * scale


@triton.jit
def _add_products(acc, ratio, p, v, scale_ptr, D: tl.constexpr, DV: tl.constexpr):
    products = tl.dot(p, v).to(tl.float32)
    sums = products * tl.load(scale_ptr + tl.arange(0, DV))[None, :]
    sums += tl.load(scale_ptr + D + tl.arange(0, DV))[None, :]
    return acc * ratio[:, None] + sums


@triton.jit
def weigh_bytes(
    acc, m, base, l, total, s, to_m, unit, v, scale_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Takes up a block with scores s: to_m brings them to the unit of m, in which a weight is 2 ** (unit * score).

    acc, l and total, the sums of the weights before and after they become bytes, are relative to `base`: the maximum of
    the block before, or SPAN less than the row's maximum m where that is more. acc and v are tuples of one or two parts
    of DV channels each: products take the registers of one part at a time. Returns all five.
    """
    top = tl.max(s, 1)
    m_new = tl.maximum(m, top * to_m)
    new_base = tl.maximum(top * to_m, m_new - SPAN)
    finite = tl.where(new_base == float("-inf"), 0.0, new_base)  # nothing seen so far
    ratio = tl.exp2((base - finite) * unit)
    offset = LOG2_255 + (top * to_m - finite) * unit
    # Differences first: the exponent of the largest score is then exactly the offset, and no byte overflows.
    x = (s - tl.where(top == float("-inf"), 0.0, top)[:, None]) * (to_m * unit)[:, None] + offset[:, None]
    p = tl.exp2(x)
    rounded = p + BYTE
    bits = rounded.to(tl.int32, bitcast=True)
    l = l * ratio + tl.sum(p, 1)
    total = total * ratio + tl.sum(bits - BYTE_BITS, 1).to(tl.float32)
    if v[0].dtype == tl.int8:
        p8 = pair_order(bits.to(tl.int8), BLOCK_M, BLOCK_N)
    else:
        p8 = (rounded - ROUND).to(v[0].dtype)
    new_acc = ()
    for i in tl.static_range(len(acc)):
        new_acc = new_acc + (_add_products(acc[i], ratio, p8, v[i], scale_ptr + i * DV, D, DV),)  # noqa: RUF005
    return new_acc, m_new, new_base, l, total
