# SPDX-License-Identifier: Apache-2.0
"""Long sequences: sampled queries against exact attention, and the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_kit import Case, check_errors, errors, exact, poisoned_attention, randn

EDGE_ROWS = 64  # at either end
INNER_ROWS = 128
HEADS = [(1, 2, 64), (1, 2, 128), (2, 1, 128)]  # queries per key head, key heads, head dim


def sampled_rows(length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Queries at the start, at the end and at random between, kept apart: the first causal outputs are far larger."""
    generator = torch.Generator().manual_seed(length)
    inner = torch.randint(EDGE_ROWS, length - EDGE_ROWS, (INNER_ROWS,), generator=generator).unique()
    rows = {"first": torch.arange(EDGE_ROWS), "inner": inner, "last": torch.arange(length - EDGE_ROWS, length)}
    return {name: index.to(device) for name, index in rows.items()}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("group", "heads_kv", "head_dim"), HEADS, ids=["d64", "d128", "d128-gqa"])
@pytest.mark.parametrize("length", [16384, 65536, 131072])
def test_long_sequence(
    length: int,
    group: int,
    heads_kv: int,
    head_dim: int,
    causal: bool,
    served: list[str],
    tolerance: dict[str, float],
    device: torch.device,
    record: Any,
) -> None:
    if torch.cuda.mem_get_info(device)[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    case = Case(0, 1, heads_kv, group, length, length, head_dim, causal, torch.bfloat16, "bhsd")
    q, k, v = randn(case, device)
    samples = sampled_rows(length, device)
    want = {name: exact(q, k, v, causal, rows=rows) for name, rows in samples.items()}
    for precision in served:
        out, lse = poisoned_attention(case, q, k, v, precision)
        again, lse_again = poisoned_attention(case, q, k, v, precision)
        assert torch.equal(out, again), f"{precision}, {case}: other bits on the second call"
        assert torch.equal(lse, lse_again), f"{precision}, {case}: other LSE bits on the second call"
        for name, rows in samples.items():
            point = errors(f"{case}, {name} rows", out[:, :, rows], lse[:, :, rows], *want[name])
            record.add("long", precision, **point)
            check_errors(point, precision, tolerance[precision])
