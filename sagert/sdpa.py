# SPDX-License-Identifier: Apache-2.0
"""torch's own attention with the meaning of sagert's arguments: what fallback="sdpa" runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sagert.visibility import Pattern, segments


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float
) -> Tensor:
    # The keyword enable_gqa is left out where it is not needed, for torch 2.4.
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, **gqa)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, seen: Pattern, scale: float
) -> Tensor:
    """scaled_dot_product_attention of tensors in the order B, H, S, D: [B, H, S, Dv] in q's dtype.

    Alignment and window become a mask, which takes S x Sk bytes; queries that see no key give 0, as sagert's kernels do
    (torch gives NaN in some versions). A mask in a float type that is not q's is used in fp32.
    """
    (b, h, s, _), sk = q.shape, k.shape[2]
    if sk == 0:
        return q.new_zeros(b, h, s, v.shape[3])
    low, high = seen.limits(s, sk)
    if mask is None and low is None and (high is None or high == 0):
        return _sdpa(q, k, v, None, dropout_p, high is not None, scale)
    queries, keys = (torch.arange(size, device=q.device) for size in (s, sk))
    hidden = seen.hidden(queries, keys, s, sk)
    if mask is None or mask.dtype == torch.bool:
        allowed = mask if hidden is None else ~hidden if mask is None else mask & ~hidden
        blind = None if allowed is None else ~allowed.any(-1, keepdim=True)
    else:
        allowed = mask if mask.dtype == q.dtype else mask.float()
        allowed = allowed if hidden is None else allowed.masked_fill(hidden, -math.inf)
        blind = (allowed == -math.inf).all(-1, keepdim=True)
    if allowed is not None:
        allowed = allowed.expand(b, h, s, sk)
    if allowed is not None and allowed.dtype not in (torch.bool, q.dtype):
        out = _sdpa(q.float(), k.float(), v.float(), allowed, dropout_p, False, scale).to(q.dtype)
    else:
        out = _sdpa(q, k, v, allowed, dropout_p, False, scale)
    return out if blind is None else out.masked_fill(blind, 0.0)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seen: Pattern, scale: float
) -> Tensor:
    """`attention` of each packed sequence, one after the other: [total_q, H, Dv]. Waits for the device."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for queries, keys in segments(cu_seqlens_q, cu_seqlens_k):
        if queries.stop > queries.start:
            mine, its_k, its_v = (t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys]))
            out[queries] = attention(mine, its_k, its_v, None, 0.0, seen, scale)[0].transpose(0, 1)
    return out
