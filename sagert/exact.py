# SPDX-License-Identifier: Apache-2.0
"""Attention in float64 without any quantization, which accuracy is measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sagert.visibility import pattern

CHUNK_ELEMENTS = 1 << 23  # scores held at a time: 64 MiB in float64


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top_left",
) -> tuple[Tensor, Tensor]:
    """Attention in float64: (out [B, H, S, Dv], lse [B, H, S]), both float64.

    q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] of any float dtype, H a multiple of Hk; attn_mask, window and
    causal_alignment as in `sagert.attention`. A query that sees no key gives 0 and -inf, whatever the inputs are.
    """
    b, h, s, d = q.shape
    sk, dv = k.shape[2], v.shape[3]
    group = h // max(k.shape[1], 1)
    scale = (d**-0.5 if d else 1.0) if scale is None else scale
    seen = pattern(is_causal, window, causal_alignment)
    out = torch.zeros(b, h, s, dv, dtype=torch.float64, device=q.device)
    lse = torch.full((b, h, s), -math.inf, dtype=torch.float64, device=q.device)
    if sk == 0:
        return out, lse
    mask = None if attn_mask is None else attn_mask.expand(b, h, s, sk)
    keys = torch.arange(sk, device=q.device)
    step = max(1, CHUNK_ELEMENTS // sk)
    for i in range(b):
        for j in range(h):
            kd, vd = k[i, j // group].double(), v[i, j // group].double()
            finite = torch.isfinite(vd)
            bad = (~finite.all(-1)).nonzero().flatten().tolist()
            clean = torch.where(finite, vd, 0.0)
            for first in range(0, s, step):
                rows = slice(first, min(first + step, s))
                scores = (q[i, j, rows].double() @ kd.T) * scale
                hidden = seen.hidden(torch.arange(rows.start, rows.stop, device=q.device), keys, s, sk)
                hidden = torch.zeros_like(scores, dtype=torch.bool) if hidden is None else hidden
                if mask is not None:
                    part = mask[i, j, rows]
                    if part.dtype == torch.bool:
                        hidden = hidden | ~part
                    else:
                        hidden = hidden | (part == -math.inf)
                        scores = scores + part.double()
                scores = scores.masked_fill(hidden, -math.inf)
                value = torch.softmax(scores, -1) @ clean
                for key in bad:  # a hidden key must not turn 0 * inf into NaN
                    extra = torch.where(finite[key], 0.0, vd[key])
                    value = torch.where(hidden[:, key, None], value, value + extra)
                blind = hidden.all(-1)
                out[i, j, rows] = value.masked_fill(blind[:, None], 0.0)
                lse[i, j, rows] = torch.logsumexp(scores, -1).masked_fill(blind, -math.inf)
    return out, lse


def error_metrics(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Cosine similarity, relative L1 (sum |a - e| / sum |e|) and root mean square error, computed in float64."""
    a, e = actual.double().flatten(), expected.double().flatten()
    norm = (a.norm() * e.norm()).item()
    total = e.abs().sum().item()
    difference = (a - e).abs().sum().item()
    return {
        "cosine": (a @ e).item() / norm if norm else 1.0,
        "relative_l1": difference / total if total else difference,
        "rmse": (a - e).square().mean().sqrt().item() if a.numel() else 0.0,
    }
