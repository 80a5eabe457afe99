# SPDX-License-Identifier: Apache-2.0
"""Threads and streams on first use, and two devices by turns, with every feature."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import feature_run
import pytest
import torch
from feature_cases import Limits, generated

import sagert

CALLS = 100


@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8"])
def test_first_use_from_eight_threads(precision: str, here: list[Any], tmp_path: Path) -> None:
    rows = [row for row in here if row.precision == precision]
    if not rows:
        pytest.skip(f"no row of this device computes {precision}")
    features = {"mask", "window"} <= {flag for row in rows for flag in row.flags}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("first_use.py"), precision, "features" if features else "plain"],
        cwd=tmp_path,  # not the clone, whose sagert has no library
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_side_stream(here: list[Any], info: Any, device: torch.device) -> None:
    """Masks, cumulative lengths and inputs still being written on the current stream are waited for."""
    big = torch.randn(4096, 4096, device=device)
    for case in generated(28, Limits.of(here)):
        problem = feature_run.build(case, device)
        kept = {name: whole.clone() for name, whole in problem.wholes.items()}
        for row, chosen in feature_run.plans(case, here, info):
            if not chosen:
                continue
            want, _ = feature_run.public(problem, row.precision)
            torch.cuda.synchronize()
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                for whole in problem.wholes.values():
                    whole.zero_()
                for _ in range(4):
                    big @ big
                for name, whole in problem.wholes.items():
                    whole.copy_(kept[name])
                got, _ = feature_run.public(problem, row.precision)
            stream.synchronize()
            assert torch.equal(got, want), f"{row.id}, {case}"


def test_two_devices_by_turns(here: list[Any], info: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    current = torch.cuda.current_device()
    first, second = torch.device("cuda", current), torch.device("cuda", 1 - current if current < 2 else 0)
    if torch.cuda.get_device_capability(first) != torch.cuda.get_device_capability(second):
        pytest.skip("needs two GPUs of one capability")
    cases = [c for c in generated(60, Limits.of(here)) if feature_run.plans(c, here, info)][:10]
    problems, wanted = [], []
    for case in cases:
        row = next(row for row, chosen in feature_run.plans(case, here, info) if chosen)
        mine = feature_run.build(case, first)
        theirs = feature_run.build(case, second)
        for name, whole in theirs.wholes.items():  # what a seed draws is the device's own business
            whole.copy_(mine.wholes[name])
        problems.append({first: mine, second: theirs, "precision": row.precision})
        wanted.append(feature_run.public(mine, row.precision)[0])
    for call in range(CALLS):
        turn = call // 2 % len(cases)
        where = (first, second)[call % 2]
        got, _ = feature_run.public(problems[turn][where], problems[turn]["precision"])
        assert torch.cuda.current_device() == current
        assert got.device == where
        assert torch.equal(got.to(first), wanted[turn]), f"call {call} on {where}: {cases[turn]}"


def test_nothing_waits_for_the_device(here: list[Any], info: Any, device: torch.device) -> None:
    """No call synchronizes, packed sequences included; what torch can see of it."""
    for case in generated(28, Limits.of(here)):
        plans = [row for row, chosen in feature_run.plans(case, here, info) if chosen]
        problem = feature_run.build(case, device)
        for row in plans:
            feature_run.public(problem, row.precision)
            torch.cuda.set_sync_debug_mode("error")
            try:
                feature_run.public(problem, row.precision)
                if "quantized_kv" in row.flags and case.segments is None:
                    sagert.quantize_kv(problem.k, problem.v, precision=row.precision)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_broadcast_mask_is_not_copied(here: list[Any], device: torch.device) -> None:
    """One mask row for 64 heads of 4,096 queries: a call takes less memory than that mask written out would."""
    if not any("mask" in row.flags for row in here):
        pytest.skip("no row of this device serves masks")
    length, heads = 4096, 64
    q, k, v = (torch.randn(1, heads, length, 64, device=device).to(torch.float16) for _ in range(3))
    mask = torch.rand(length, device=device) < 0.5
    for precision in dict.fromkeys(row.precision for row in here if "mask" in row.flags):
        out = sagert.attention(q, k, v, mask, precision=precision)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        sagert.attention(q, k, v, mask, precision=precision, out=out)
        assert torch.cuda.max_memory_allocated(device) - before < heads * length * length // 2, precision
