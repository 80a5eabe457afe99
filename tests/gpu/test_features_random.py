# SPDX-License-Identifier: Apache-2.0
"""2,000 requests drawn at random, any legal combination of features, between guard bands, against float64 attention.

Each runs through the public function, then through the C ABI on every row that serves it, where the workspace and the
LSE lie between guard bands too: the row that selection takes must give the same bits both ways.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import feature_run
import pytest
import torch
from feature_cases import FeatureCase, Limits, drawn

import sagert

REQUESTS = 2000
CHUNK = 50


def failures_of(case: FeatureCase, here: list[Any], info: Any, device: torch.device, record: Any) -> list[str]:
    """What is wrong with any row's result on a case; the case's number decides about fp32 inputs and "auto"."""
    planned = feature_run.plans(case, here, info)
    if case.index % 8 == 0:  # computed through bf16
        case = dataclasses.replace(case, dtype=torch.float32)
        planned = [(row, chosen) for row, chosen in feature_run.plans(case, here, info) if chosen]
    problem = feature_run.build(case, device)
    want = feature_run.expected(problem)
    failures: list[str] = []

    def judge(row: Any, run: feature_run.Run, way: str) -> None:
        point = feature_run.measured(case, run, *want)
        record.add("random_features", row.id, **point)
        failures.extend(f"{row.id}, {way}, {case}: {text}" for text in feature_run.verdict(point, row))

    for row, chosen in planned:
        first = None
        if chosen:
            first = feature_run.guarded(problem, row.precision)
            judge(row, first, "public")
            failures += quantized_failures(problem, row, first)
        if case.dtype != torch.float32:
            second = feature_run.guarded(problem, row.precision, row.id)
            judge(row, second, "C ABI")
            if first is not None and not feature_run.same(first, second):
                failures.append(f"{row.id}, {case}: other bits through the C ABI")
    if case.index % 10 == 1:
        auto = feature_run.answer(case, "auto", info).row
        for row in here:
            if row.id == auto:
                judge(row, feature_run.guarded(problem, "auto"), "auto")
    return failures


def quantized_failures(problem: feature_run.Problem, row: Any, one_call: feature_run.Run) -> list[str]:
    """Of every fourth request that can be: keys and values quantized first must give the bits of the one call."""
    case = problem.case
    if case.index % 4 != 2 or case.segments is not None or "quantized_kv" not in row.flags:
        return []
    kv = sagert.quantize_kv(
        problem.k, problem.v, precision=row.precision, smooth_k=case.smooth_k, masked=not case.plain
    )
    given = feature_run.options_of(problem) | {"precision": row.precision, "return_lse": True}
    given.pop("smooth_k", None)
    out, lse = sagert.attention(problem.q, kv, **given)
    runs = {"public": feature_run.Run(out, lse, {})}
    if case.dtype != torch.float32:
        runs["C ABI"] = feature_run.guarded(problem, row.precision, row.id, two_calls=True)
    wrong = [f"{way}: other bits" for way, run in runs.items() if not feature_run.same(one_call, run)]
    wrong += [text for run in runs.values() for text, good in run.checks.items() if not bool(good)]
    return [f"{row.id}, {case}, keys and values quantized first, {text}" for text in wrong]


@pytest.mark.parametrize("first", range(0, REQUESTS, CHUNK), ids=lambda first: f"{first}-{first + CHUNK - 1}")
def test_random_requests(first: int, seed: int, here: list[Any], info: Any, device: torch.device, record: Any) -> None:
    print(f"seed {seed}: pytest --seed {seed} repeats these requests")
    limits = Limits.of(here)
    failures, served = [], 0
    for index in range(first, first + CHUNK):
        case = drawn(index, seed, limits)
        if not feature_run.plans(case, here, info):
            continue
        served += 1
        failures += failures_of(case, here, info, device, record)
    assert not failures, f"seed {seed}, {len(failures)} failures in {served} requests:\n" + "\n".join(failures)
    assert served >= CHUNK // 2, f"seed {seed}: rows serve {served} of {CHUNK} requests"
