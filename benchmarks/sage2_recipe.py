# SPDX-License-Identifier: Apache-2.0
"""A simulation of SageAttention2's recipe for compute capability 9.0, as a bar for accuracy.

It follows the paper (arXiv 2411.10958) and the defaults of the package's 8-bit path on Hopper: what is quantized, by
which groups, with which rounding, and how often sums leave the tensor core. It is not the package: its figures are
close to the package's, not equal to them. Sums in fp16 are those of SageAttention2++ (arXiv 2505.21136), whose V
reaches 2.25 instead of 448: small values of V are then subnormal numbers of e4m3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEYS = 128  # per block
STEP = 32  # keys the tensor core's FP8 accumulator takes at a time
WARP_ROWS = 16
LOG2E = math.log2(math.e)
P_OFFSET = 8.807  # log2 of the scale of P, just below e4m3's largest value 448
HALF_KEYS = 64  # whose products are summed in fp16, an instruction's STEP after the other
V_MAX, V_MAX_HALF = 448.0, 2.25


def to_int8(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 values of fp32 `x` ``[N, S, D]``, held in fp32, and scales ``[N, S, 1]``, one per group ``[S]`` of rows.

    Rounding is half away from zero.
    """
    rows = x.abs().amax(-1)
    amax = rows.new_zeros(rows.shape[0], int(groups.max()) + 1)
    amax.scatter_reduce_(1, groups.expand_as(rows), rows, "amax")
    scale = (amax / 127.0 + 1e-7).gather(1, groups.expand_as(rows)).unsqueeze(-1)
    scaled = x / scale
    return torch.trunc(scaled + 0.5 * scaled.sign()).clamp(-127, 127), scale


def thread_groups(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Group of every row of Q (i and i + 8 of 16) and of every key (equal (j mod 8) // 2 in 128), int64 ``[S]``."""
    i = torch.arange(length, device=device)
    return i // WARP_ROWS * 8 + i % 8, i // KEYS * 4 + i % 8 // 2


def truncating_matmul(p: Tensor, v: Tensor, bits: int) -> Tensor:
    """`p` ``[N, S, K]`` times `v` ``[N, K, D]``, fp32, summed as Hopper's tensor core sums FP8 products.

    In steps of 32 keys the products and the sum so far are cut to `bits` bits, counted from the largest one's first.
    """
    total = p.new_zeros(*p.shape[:2], v.shape[2])
    for start in range(0, p.shape[2], STEP):
        products = p[:, :, start : start + STEP, None] * v[:, None, start : start + STEP]
        largest = torch.maximum(products.abs().amax(2), total.abs())
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
        total = (products.div_(unit.unsqueeze(2)).trunc_().sum(2) + torch.trunc(total / unit)) * unit
    return total


def half_matmul(p: Tensor, v: Tensor) -> Tensor:
    """`p` ``[N, S, K]`` times `v` ``[N, K, D]``, fp32: sums of HALF_KEYS products in fp16, added in fp32."""
    total = p.new_zeros(*p.shape[:2], v.shape[2])
    for start in range(0, p.shape[2], HALF_KEYS):
        part = torch.zeros_like(total)
        for step in range(start, min(start + HALF_KEYS, p.shape[2]), STEP):
            keys = slice(step, min(step + STEP, start + HALF_KEYS))
            part = (part + p[:, :, keys] @ v[:, keys]).to(torch.float16).float()
        total += part
    return total


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, bits: int | None = 14, half_sums: bool = False
) -> Tensor:
    """The recipe's output.

    Args:
        q, k, v: ``[B, H, S, D]`` and twice ``[B, Hk, Sk, D]``, fp16 or bf16; no channel of `v` all zero.
        is_causal: whether query i sees keys 0 to i only.
        bits: that the tensor core's accumulator keeps in P V (it goes to fp32 after every 128 keys); None: all.
        half_sums: whether P V is summed in fp16 instead, as SageAttention2++ does; `bits` does not matter then.

    Returns:
        ``[B, H, S, D]`` in q's dtype.
    """
    batch, heads, length, d = q.shape
    # The mean and the difference are rounded to the inputs' dtype.
    k = (k - k.mean(dim=2, keepdim=True)).repeat_interleave(heads // k.shape[1], 1)
    v = v.repeat_interleave(heads // v.shape[1], 1)
    qf, kf, vf = (x.reshape(batch * heads, -1, d).float() for x in (q, k, v))
    q8, q_scale = to_int8(qf, thread_groups(length, q.device)[0])
    k8, k_scale = to_int8(kf, thread_groups(kf.shape[1], q.device)[1])
    v_scale = vf.abs().amax(1, keepdim=True) / (V_MAX_HALF if half_sums else V_MAX)
    v8 = (vf / v_scale).to(torch.float8_e4m3fn).float()
    q_scale = q_scale * (d**-0.5 * LOG2E)

    position = torch.arange(length, device=q.device)[:, None]
    m = q8.new_full((batch * heads, length, 1), -5e6)
    total = torch.zeros_like(m)
    acc = torch.zeros_like(qf)
    for start in range(0, kf.shape[1], KEYS):
        keys = slice(start, min(start + KEYS, kf.shape[1]))
        scores = q8 @ k8[:, keys].transpose(1, 2) * q_scale * k_scale[:, keys].transpose(1, 2)
        if is_causal:
            scores.masked_fill_(torch.arange(keys.start, keys.stop, device=q.device) > position, -5e6)
        m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
        alpha = torch.exp2(m - m_new)
        p = torch.exp2(scores - m_new + P_OFFSET)
        total = total * alpha + p.sum(-1, keepdim=True)
        p8 = p.to(torch.float8_e4m3fn).float()
        if half_sums:
            products = half_matmul(p8, v8[:, keys])
        else:
            products = p8 @ v8[:, keys] if bits is None else truncating_matmul(p8, v8[:, keys], bits)
        acc = acc * alpha + products
        m = m_new
    return (acc / total * v_scale).reshape(q.shape).to(q.dtype)
