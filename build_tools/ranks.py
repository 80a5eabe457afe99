# SPDX-License-Identifier: Apache-2.0
"""Measured exceptions to a row's rank: [[row.rank_when]], the first whose conditions a call meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from build_tools.errors import ManifestError
from build_tools.schema import Table

UNBOUNDED = 2**63 - 1


@dataclass(frozen=True)
class RankWhen:
    """A rank and the calls it holds for. Bounds are inclusive.

    head_dim is that of the call, so that a padded size stands for the range of sizes it serves; tiles is
    batch * heads_q * ceil(seqlen_q / 128), the number of attention tiles of a call.
    """

    rank: int
    causal: bool | None
    head_dim: tuple[int, int]
    seqlen_q: tuple[int, int]
    seqlen_k: tuple[int, int]
    tiles_max: int
    given: dict[str, Any]  # as in the manifest


def _range(table: Table, name: str) -> tuple[int, int]:
    low, high = table.at_least(f"{name}_min", 0, 0), table.at_least(f"{name}_max", 0, UNBOUNDED)
    if low > high:
        table.fail(f"{name}_min", f"is above {name}_max = {high}")
    return low, high


def read(data: dict[str, Any], axes: dict[str, list[Any]], where: str) -> RankWhen:
    """One [[row.rank_when]] of a row with these axes."""
    table = Table(data, f"{where}: rank_when")
    rank = table.at_least("rank", 0)
    causal = table.take("causal", bool, None)
    if causal is not None and causal not in axes["causal"]:
        table.fail("causal", f"axes.causal is {axes['causal']}")
    padded = table.take("head_dim", int, None)
    head_dim = (0, UNBOUNDED)
    if padded is not None:
        if padded not in axes["head_dim"]:
            table.fail("head_dim", f"allowed: {', '.join(map(str, axes['head_dim']))}")
        head_dim = (max((size for size in axes["head_dim"] if size < padded), default=0) + 1, padded)
    entry = RankWhen(
        rank, causal, head_dim, _range(table, "seqlen_q"), _range(table, "seqlen_k"),
        table.at_least("tiles_max", 0, UNBOUNDED), data,
    )  # fmt: skip
    if len(table.keys()) == 1:
        table.fail("rank", "has no condition: give the row this rank instead")
    table.finish()
    return entry


def check_distinct(rows: list[tuple[str, tuple[int, int], set[int]]]) -> None:
    """Raises ManifestError where two rows that one device may have share a rank: (name, runs_on, its ranks) each."""
    for i, (name, runs_on, ranks) in enumerate(rows):
        for other, other_runs_on, other_ranks in rows[:i]:
            meet = runs_on[0] <= other_runs_on[1] and other_runs_on[0] <= runs_on[1]
            if meet and ranks & other_ranks:
                raise ManifestError(f"{name}: rank {min(ranks & other_ranks)} is a rank of {other} too: no two may tie")
