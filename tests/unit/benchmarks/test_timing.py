# SPDX-License-Identifier: Apache-2.0
"""How contenders share a device's time, with a clock that says 10 ms for every call in place of a device's."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import timing

SETTLE, SAMPLES, TURNS = 4, 2, 5  # runs in front of a visit's samples, samples of a visit, turns


@pytest.fixture
def log(monkeypatch):
    """Who ran, in order."""
    ran = []

    def elapsed(call, repeats):
        ran.append(call())
        return 10.0 / repeats

    monkeypatch.setattr(timing, "elapsed", elapsed)
    return ran


def measured(names):
    calls = {name: (lambda name=name: name) for name in names}
    return timing.measure(calls, rounds=SAMPLES * TURNS, sample_ms=10.0, settle_ms=10.0 * SETTLE, turns=TURNS)


def test_contenders_take_turns_in_changing_orders(log):
    names = ("a", "b", "c")
    timings = measured(names)
    assert {t.samples for t in timings.values()} == {SAMPLES * TURNS}
    runs = log[2 * len(names) :]  # each has warmed up twice
    lengths = [SETTLE] * len(names) + [SETTLE + SAMPLES] * len(names) * TURNS
    assert len(runs) == sum(lengths)
    visits = []
    for length in lengths:
        visit, runs = runs[:length], runs[length:]
        assert len(set(visit)) == 1
        visits.append(visit[0])
    orders = [tuple(visits[i : i + len(names)]) for i in range(0, len(visits), len(names))]
    assert all(sorted(order) == list(names) for order in orders)
    assert len(set(orders)) > 1


def test_the_order_is_the_same_in_every_run(log):
    measured("abc")
    first = list(log)
    log.clear()
    measured("abc")
    assert log == first


def test_summary_has_the_percentiles():
    found = timing.summary([float(x) for x in reversed(range(101))])
    assert (found.median, found.low, found.high, found.samples) == (50.0, 10.0, 90.0, 101)
