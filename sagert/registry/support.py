# SPDX-License-Identifier: Apache-2.0
"""Support tables: precision x head dim on one device, generated from the rows."""

from __future__ import annotations

from dataclasses import dataclass

from sagert.codes import PRECISIONS
from sagert.registry.device import Device
from sagert.registry.rows import Row, kernels
from sagert.registry.selection import Selection, explain

HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Support:
    """One cell: the row that serves it, or the reason why none does."""

    precision: str
    head_dim: int
    row: str | None
    reason: str | None


def _reason(answer: Selection, precision: str, rows: list[Row]) -> str:
    """The reasons of the row of this precision that came nearest."""
    candidates: list[tuple[str, ...]] = [answer.reasons.get(row.id, ()) for row in rows if row.precision == precision]
    if not candidates:
        return f"no kernel row of this installation computes {precision}"
    nearest = min(candidates, key=len)
    return "; ".join(nearest) or answer.hint or "refused"


def support_table(device: Device, *, dtype: str = "bfloat16", is_causal: bool = False) -> list[Support]:
    """Every precision (without auto) at every common head dim, for B 1, H 8, S 1024."""
    cells = []
    rows = kernels()
    for precision in PRECISIONS:
        if precision == "auto":
            continue
        for head_dim in HEAD_DIMS:
            answer = explain(
                (1, 8, 1024, head_dim), dtype=dtype, is_causal=is_causal, precision=precision, device=device
            )
            reason = None if answer.row else _reason(answer, precision, rows)
            cells.append(Support(precision, head_dim, answer.row, reason))
    return cells
