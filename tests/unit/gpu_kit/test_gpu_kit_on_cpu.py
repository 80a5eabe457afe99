# SPDX-License-Identifier: Apache-2.0
"""The GPU tests' way through the public functions, on CPU tensors and the reference."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
import feature_nonfinite  # noqa: E402
import feature_run  # noqa: E402
from feature_cases import FeatureCase, drawn, generated  # noqa: E402

from sagert import reference  # noqa: E402

CPU = torch.device("cpu")
WORK_MAX = 3e6  # scores times channels of a case: the reference takes its time


class Row(NamedTuple):
    """What the tests look at of a kernel row."""

    id: str
    precision: str
    relative_l1: float


ROWS = [
    Row("cpu.int8_fp16", "int8_fp16", 0.0114),
    Row("cpu.int8_fp8", "int8_fp8", 0.039),
    Row("cpu.int8_int8", "int8_int8", 0.0158),
]


def small(cases: list[FeatureCase]) -> list[FeatureCase]:
    def work(case: FeatureCase) -> int:
        pairs = case.segments or ((case.seqlen_q, case.seqlen_k),) * case.batch
        return sum(q * k for q, k in pairs) * case.heads * case.head_dim

    return [case for case in cases if work(case) <= WORK_MAX]


def failures_of(case: FeatureCase, precision: Row) -> list[str]:
    problem = feature_run.build(case, CPU)
    run = feature_run.guarded(problem, precision.precision)
    point = feature_run.measured(case, run, *feature_run.expected(problem))
    return [f"{precision.id}, {case}: {text}" for text in feature_run.verdict(point, precision)]


def test_rows_are_the_reference():
    assert [row.precision for row in ROWS] == list(reference.PRECISIONS)


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_generated_features():
    cases = small(generated(420))
    assert len(cases) >= 100
    wrong = [text for i, case in enumerate(cases) for text in failures_of(case, ROWS[i % 2])]
    assert not wrong, "\n".join(wrong)


def test_random_requests():
    cases = small([drawn(i, 41) for i in range(120)])
    cases += [dataclasses.replace(case, dtype=torch.float32) for case in cases[:10]]
    wrong = [text for i, case in enumerate(cases) for text in failures_of(case, ROWS[i % 2])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("turn", range(len(feature_nonfinite.CASES)), ids=list(feature_nonfinite.CASES))
def test_nonfinite_placement(turn):
    """Every case with some of the places, every place with some of the cases."""
    case = dataclasses.replace(list(feature_nonfinite.CASES.values())[turn], batch=1, group=1)
    if case.segments is not None:
        case = dataclasses.replace(case, batch=len(case.segments))
    rows, places = [ROWS[turn % 2]], slice(turn % 4, None, 4)
    failures, runs = feature_nonfinite.placement_failures(case, rows, None, CPU, places)
    assert not failures, "\n".join(failures)
    assert runs >= 1


def case_of_checks() -> FeatureCase:
    return next(c for c in generated(100) if c.mask and c.lse and c.dtype == torch.float16 and c.seqlen_k)


def wrongly(monkeypatch, damage):
    """The verdict on a public function that does `damage` to (problem, out) after a right result."""
    case, right = case_of_checks(), feature_run.public

    def wrong(problem, precision, out=None, lse=None):
        result = right(problem, precision, out, lse)
        damage(problem, out)
        return result

    monkeypatch.setattr(feature_run, "public", wrong)
    return failures_of(case, ROWS[0])


def test_checks_find_what_is_wrong(monkeypatch):
    assert not wrongly(monkeypatch, lambda problem, out: None)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda problem, out: problem.k.mul_(2), "k was modified"),
        (
            lambda problem, out: problem.wholes["attn_mask"][0].fill_(problem.wholes["attn_mask"][0] == 0),
            "attn_mask was",
        ),
        (lambda problem, out: out._base[1:2].fill_(3.0), "outside the output"),
        (lambda problem, out: out[..., -1].fill_(float("nan")), "not finite"),
        (lambda problem, out: out.mul_(1.5), "relative L1"),
    ],
)
def test_checks_find_damage(monkeypatch, damage, text):
    assert any(text in found for found in wrongly(monkeypatch, damage))
