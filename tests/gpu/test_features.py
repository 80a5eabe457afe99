# SPDX-License-Identifier: Apache-2.0
"""Every row of this device, over cases generated from what the rows serve: masks, windows, alignment, packed sequences.

The row that selection takes runs through the public function, every other row that serves the case through the C ABI.
"""

from __future__ import annotations

from typing import Any

import feature_run
import pytest
import torch
from feature_cases import CASES, Limits, generated

import sagert

CHUNK = 60


def test_the_cases_reach_every_row_and_flag(here: list[Any], info: Any) -> None:
    assert not feature_run.coverage_failures(generated(CASES, Limits.of(here)), here, info)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK), ids=lambda first: f"{first}-{first + CHUNK - 1}")
def test_generated_features(first: int, here: list[Any], info: Any, device: torch.device, record: Any) -> None:
    failures, runs = [], 0
    for case in generated(CASES, Limits.of(here))[first : first + CHUNK]:
        planned = feature_run.plans(case, here, info)
        if not planned:
            continue
        problem = feature_run.build(case, device)
        want = feature_run.expected(problem)
        for row, chosen in planned:
            run = feature_run.guarded(problem, row.precision, None if chosen else row.id)
            point = feature_run.measured(case, run, *want)
            record.add("features", row.id, **point)
            failures += [f"{row.id}, {case}: {text}" for text in feature_run.verdict(point, row)]
            runs += 1
    assert not failures, f"{len(failures)} failures in {runs} runs:\n" + "\n".join(failures)
    assert runs >= CHUNK // 2, f"{runs} runs: hardly any row serves these cases"


def test_public_explanation_agrees(here: list[Any], info: Any, device: torch.device) -> None:
    """`sagert.explain` with a call's own arguments names the row that the C ABI takes for it."""
    for case in generated(140, Limits.of(here)):
        problem = feature_run.build(case, device)
        given = feature_run.options_of(problem) | {"return_lse": case.lse}
        tensors = [problem.q, problem.k, problem.v]
        if case.segments is not None:  # by shapes: sequences, heads, the longest, head dim
            heads = (case.heads, case.heads_kv, case.heads_kv)
            lengths = (case.seqlen_q, case.seqlen_k, case.seqlen_k)
            dims = (case.head_dim, case.head_dim, case.head_dim_v)
            tensors = [(case.batch, *sizes) for sizes in zip(heads, lengths, dims, strict=True)]
            given |= {"varlen": True, "dtype": case.dtype}
        for precision in ("auto", here[0].precision):
            told = sagert.explain(*tensors, precision=precision, device=info, **given).row
            assert told == feature_run.answer(case, precision, info).row, f"{precision}, {case}"
