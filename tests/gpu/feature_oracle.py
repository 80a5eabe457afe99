# SPDX-License-Identifier: Apache-2.0
"""Float64 attention with masks, windows, alignment and packed sequences: what the feature tests measure against."""

from __future__ import annotations

import torch

CHUNK_SCORES = 1 << 26  # held at a time: 512 MiB in float64
INF = float("inf")
Window = tuple[int | None, int | None]


def positions_see(
    rows: torch.Tensor, seqlen_q: int, seqlen_k: int, causal: bool, bottom_right: bool, window: Window | None
) -> torch.Tensor:
    """Which keys the queries `rows` int64 ``[R]`` see by their position alone: bool ``[R, Sk]``.

    Query i stands at key i, or at key i + Sk - S with `bottom_right`. Causal hides the keys behind its position; a
    window (left, right) those further away, None or -1 standing for no bound.
    """
    keys = torch.arange(seqlen_k, device=rows.device)
    position = (rows + (seqlen_k - seqlen_q if bottom_right else 0))[:, None]
    seen = torch.ones(len(rows), seqlen_k, dtype=torch.bool, device=rows.device)
    if causal:
        seen &= keys <= position
    left, right = window or (None, None)
    if left is not None and left >= 0:
        seen &= keys >= position - left
    if right is not None and right >= 0:
        seen &= keys <= position + right
    return seen


def attend(scores: torch.Tensor, seen: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the seen keys of float64 `scores` ``[..., R, Sk]``, times `v` ``[..., Sk, Dv]``.

    A row that sees no key gives 0 and -inf. NaN and Inf of V reach exactly the rows that see their key.
    """
    some = seen.any(-1)
    scores = scores.masked_fill(~seen, -INF)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1).fill_(-INF)
    lse = torch.where(some, lse, -INF)
    # An unseen key has weight 0, and 0 times NaN must stay 0: finite values first, then what the seen ones add.
    out = torch.softmax(scores, -1) @ torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0)
    if not torch.isfinite(v).all():
        weight = seen.double().expand(scores.shape)
        for mark in (INF, -INF, float("nan")):
            hit = torch.isnan(v) if mark != mark else v == mark
            out = out + torch.where(weight @ hit.double() > 0, mark, 0.0)
    return torch.where(some[..., None], out, 0.0), lse


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    bottom_right: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64.

    Args:
        q: ``[B, H, S, D]``; k: ``[B, Hk, Sk, D]``; v: ``[B, Hk, Sk, Dv]``.
        mask: broadcastable to ``[B, H, S, Sk]``; bool (True attends) or floating point (added to the scaled scores).
        causal, bottom_right, window: as for `positions_see`.
        scale: multiplies Q K^T; D ** -0.5 by default.
        rows: int64 ``[R]``, which queries to compute; without it all are.

    Returns:
        Output ``[B, H, R, Dv]`` and LSE ``[B, H, R]``, both float64.
    """
    b, h, s, d = q.shape
    hk, sk, dv = k.shape[1], k.shape[2], v.shape[3]
    rows = torch.arange(s, device=q.device) if rows is None else rows
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, h, len(rows), dv, dtype=torch.float64, device=q.device)
    lse = torch.full((b, h, len(rows)), -INF, dtype=torch.float64, device=q.device)
    if sk == 0 or out.numel() == 0:
        return out, lse
    group = h // hk
    keys, values = k.double()[:, :, None].transpose(-1, -2), v.double()[:, :, None]
    if mask is not None:
        mask = mask.expand(b, h, s, sk)
    step = max(1, CHUNK_SCORES // (b * h * sk))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        queries = q[:, :, part].double().unflatten(1, (hk, group))
        scores = queries @ keys * scale
        seen = positions_see(part, s, sk, causal, bottom_right, window)
        if mask is not None:
            chosen = mask[:, :, part].unflatten(1, (hk, group))
            if chosen.dtype == torch.bool:
                seen = seen & chosen
            else:
                hidden = chosen == -INF
                seen = seen & ~hidden
                scores = scores + chosen.double().masked_fill(hidden, 0.0)
        o, z = attend(scores, seen, values)
        out[:, :, first : first + step] = o.flatten(1, 2)
        lse[:, :, first : first + step] = z.flatten(1, 2)
    return out, lse


def exact_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: tuple[tuple[int, int], ...],
    *,
    causal: bool = False,
    bottom_right: bool = False,
    window: Window | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of each packed sequence by itself.

    q ``[total_q, H, D]``, k ``[total_k, Hk, D]``, v ``[total_k, Hk, Dv]``; `segments` are (queries, keys) of each.
    Returns the output ``[total_q, H, Dv]`` and the LSE ``[H, total_q]``.
    """
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -INF, dtype=torch.float64, device=q.device)
    first_q = first_k = 0
    for queries, keys in segments:
        mine, theirs = slice(first_q, first_q + queries), slice(first_k, first_k + keys)
        o, z = exact(
            *(t[part].transpose(0, 1)[None] for t, part in ((q, mine), (k, theirs), (v, theirs))),
            causal=causal,
            bottom_right=bottom_right,
            window=window,
            scale=scale,
        )
        out[mine], lse[:, mine] = o[0].transpose(0, 1), z[0]
        first_q, first_k = mine.stop, theirs.stop
    return out, lse
