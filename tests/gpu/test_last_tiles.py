# SPDX-License-Identifier: Apache-2.0
"""Queries that are left over behind whole tiles, or are few from the start, with enough keys for all warps."""

from __future__ import annotations

import pytest
import torch
from gpu_kit import allowed, exact, lse_error_max, relative_l1

import sagert

PROBLEMS = [  # queries, keys, causal
    (1, 1536, False),
    (64, 4100, False),
    (200, 1700, False),
    (40, 13_000, False),
    (64, 33_000, False),
    (1541, 1541, True),
    (4096, 4096, True),
    (4033, 5000, True),
]


@pytest.mark.parametrize("heads", [(4, 2), (140, 35)], ids=["few", "many"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_last_tiles(
    problem: tuple[int, int, bool],
    head_dim: int,
    heads: tuple[int, int],
    served: list[str],
    tolerance: dict[str, float],
    device: torch.device,
) -> None:
    seqlen_q, seqlen_k, causal = problem
    generator = torch.Generator(device).manual_seed(seqlen_q + head_dim)
    q, k, v = (
        torch.randn(1, n, length, head_dim, device=device, generator=generator).to(torch.bfloat16)
        for n, length in ((heads[0], seqlen_q), (heads[1], seqlen_k), (heads[1], seqlen_k))
    )
    last = torch.arange((seqlen_q - 1) // 192 * 192, seqlen_q, device=device)  # queries of the last tile
    group = heads[0] // heads[1]
    shown = 2 * group  # heads that are compared
    want, want_lse = exact(q[:, :shown], k[:, :2], v[:, :2], causal, rows=last)
    for precision in served:
        made = []
        for _ in range(2):
            out = torch.full_like(q, float("nan"))
            _, lse = sagert.attention(
                q, k, v, is_causal=causal, enable_gqa=True, precision=precision, return_lse=True, out=out
            )
            assert bool(out.isfinite().all()), precision
            made.append(out)
        assert torch.equal(*made), precision
        assert torch.equal(out, sagert.attention(q, k, v, is_causal=causal, enable_gqa=True, precision=precision))
        error = relative_l1(out[:, :shown, last], want)
        assert error <= allowed(tolerance[precision], want.numel()), f"{precision}: {error:.5f}"
        assert float((lse[:, :shown, last] - want_lse).abs().max()) <= lse_error_max(precision), precision


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_behind_last_ones(head_dim: int, served: list[str], device: torch.device) -> None:
    """What warps leave in shared memory for each other stays there until it has been read: same bits, many times."""
    generator = torch.Generator(device).manual_seed(head_dim)
    q, k, v = (
        torch.randn(2, 80, 2112, head_dim, device=device, generator=generator).to(torch.bfloat16) for _ in range(3)
    )
    for precision in served:
        first = sagert.attention(q, k, v, precision=precision)
        changed = torch.zeros((), dtype=torch.bool, device=device)
        for _ in range(100):
            changed |= (sagert.attention(q, k, v, precision=precision) != first).any()
        assert not bool(changed), precision
