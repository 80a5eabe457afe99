# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf in Q, K, V and masks reach exactly the outputs that they reach in exact attention, whatever is hidden."""

from __future__ import annotations

from typing import Any

import feature_run
import pytest
import torch
from feature_nonfinite import CASES, NAN, case_of, mask, pattern_failures, placement_failures


@pytest.mark.parametrize("name", CASES)
def test_placement(name: str, here: list[Any], info: Any, device: torch.device) -> None:
    failures, runs = placement_failures(CASES[name], here, info, device)
    assert not failures, f"{name}, {len(failures)} failures in {runs} runs:\n" + "\n".join(failures)
    assert runs or not feature_run.plans(CASES[name], here, info)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_nan_in_a_mask(dtype: torch.dtype, here: list[Any], info: Any, device: torch.device) -> None:
    """A NaN makes its query NaN and no other; behind the causal diagonal it is not read."""
    case = case_of(mask=mask("random", dtype, "qk"), causal=True)
    problem = feature_run.build(case, device)
    assert problem.mask is not None
    problem.mask[50, 20] = problem.mask[200, 130] = NAN
    problem.mask[60, 300] = NAN  # behind the diagonal
    want = feature_run.expected(problem)
    assert torch.isnan(want[0]).any(-1).nonzero()[:, 2].unique().tolist() == [50, 200]
    for row, chosen in feature_run.plans(case, here, info):
        run = feature_run.guarded(problem, row.precision, None if chosen else row.id)
        wrong = pattern_failures(run.out, run.lse, *want, row.relative_l1)
        assert not wrong, f"{row.id}: {wrong}"


def test_queries_that_see_nothing_among_nonfinite_values(here: list[Any], info: Any, device: torch.device) -> None:
    """All of V is NaN where no query looks, and all of K: 0 and -inf for blind queries, finite results for the rest."""
    case = case_of(mask=mask("nothing", shape="qk"))
    problem = feature_run.build(case, device)
    assert problem.mask is not None
    problem.mask[:, :200] = True
    problem.mask[128:300] = False
    problem.v[:, :, 200:] = NAN
    problem.k[:, :, 200:] = NAN
    want = feature_run.expected(problem)
    for row, chosen in feature_run.plans(case, here, info):
        point = feature_run.measured(
            case, feature_run.guarded(problem, row.precision, None if chosen else row.id), *want
        )
        wrong = feature_run.verdict(point, row, 1.5)
        assert not wrong, f"{row.id}: {wrong}"
