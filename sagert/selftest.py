# SPDX-License-Identifier: Apache-2.0
"""The self-test of doctor: every usable row on every device, against float64 attention, into poisoned outputs."""

from __future__ import annotations

from typing import Any

import torch

from sagert import reference
from sagert.api import attention
from sagert.codes import PRECISIONS
from sagert.registry import Device, explain, kernels

# (B, H, Hk, S, Sk, D, causal): whole tiles, ragged tails, grouped heads, a head dim that must be padded.
CASES = (
    (1, 4, 4, 512, 512, 64, False),
    (1, 4, 2, 512, 512, 128, True),
    (2, 3, 1, 333, 517, 128, False),
    (1, 2, 2, 129, 1025, 72, True),
)
KERNEL_SLACK = 1.25  # small cases scatter about the accuracy measured on large ones


def _milliseconds(device: torch.device, function: Any) -> float:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    with torch.cuda.device(device):
        function()
        start.record()
        for _ in range(5):
            function()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 5


def _case(device: Device, precision: str, row: str, limit: float, case: tuple[Any, ...]) -> dict[str, Any]:
    b, h, hk, s, sk, d, causal = case
    name = f"B{b} H{h}/{hk} S{s}/{sk} D{d}" + (" causal" if causal else "")
    result: dict[str, Any] = {
        "device": f"cuda:{device.ordinal}",
        "row": row,
        "case": name,
        "limit": limit,
        "relative_l1": None,
        "milliseconds": None,
        "ok": False,
        "error": None,
    }
    place = torch.device("cuda", device.ordinal)
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, h, s, d), (b, hk, sk, d), (b, hk, sk, d))
    q, k, v = (torch.randn(shape, generator=generator).to(place, torch.bfloat16) for shape in shapes)
    out = torch.full_like(q, float("nan"))
    try:

        def call() -> None:
            attention(q, k, v, is_causal=causal, enable_gqa=True, precision=precision, out=out, fallback="error")

        result["milliseconds"] = _milliseconds(place, call)
        expected, _ = reference.exact_attention(q.cpu(), k.cpu(), v.cpu(), is_causal=causal)
        result["relative_l1"] = reference.error_metrics(out.cpu(), expected)["relative_l1"]
        result["ok"] = result["relative_l1"] <= limit
    except Exception as error:  # the report must name every row, whatever one of them does
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def run(devices: list[Device]) -> list[dict[str, Any]]:
    """One result per device, row and case: relative L1 error, limit, time of a call, ok, and the error if any."""
    limits = {row.id: row.relative_l1 * KERNEL_SLACK for row in kernels()}
    results = []
    for device in devices:
        for precision in PRECISIONS:
            if precision == "auto":
                continue
            for case in CASES:
                b, h, hk, s, sk, d, causal = case
                answer = explain(
                    (b, h, s, d), (b, hk, sk, d), is_causal=causal, precision=precision, dtype="bfloat16", device=device
                )
                if answer.row is not None:
                    results.append(_case(device, precision, answer.row, limits[answer.row], case))
    return results
