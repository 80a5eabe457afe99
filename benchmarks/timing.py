# SPDX-License-Identifier: Apache-2.0
"""Times CUDA work with events, all contenders in turn so that clocks and heat are shared fairly."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    samples: int


def elapsed(call: Call, repeats: int) -> float:
    """Milliseconds per call over `repeats` back-to-back calls on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def measure(
    calls: dict[str, Call], rounds: int, sample_ms: float = 10.0, settle_ms: float = 100.0, turns: int = 5
) -> dict[str, Timing]:
    """Times every call.

    A fast kernel runs into the power limit of its device, and clocks follow with a lag of up to 100 ms: right behind a
    frugal contender it runs faster than it can for long, right behind a hungry one slower; whoever comes first meets a
    device that has rested. Then clocks swing by some 3 % within half a second. So each contender runs for `settle_ms`
    before its samples, contenders take several turns, in an order drawn anew for each (the same in every run), and a
    turn in front of those counts for nothing.

    Args:
        calls: name -> function that launches the work on the current stream.
        rounds: samples per call, at least; each turn takes as many.
        sample_ms: how long one sample should last.
        settle_ms: how long a call runs before its samples count.
        turns: that count.

    Returns:
        name -> Timing.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        elapsed(call, 3)  # warms up: loads kernels, fills caches
        repeats[name] = max(1, math.ceil(sample_ms / max(elapsed(call, 3), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, draw = list(calls), random.Random(0)
    for turn in range(turns + 1):
        draw.shuffle(names)
        for name in names:
            passed = 0.0
            while passed < settle_ms:
                passed += elapsed(calls[name], repeats[name]) * repeats[name]
            if turn > 0:
                samples[name] += [elapsed(calls[name], repeats[name]) for _ in range(math.ceil(rounds / turns))]
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    """Median and 10th and 90th percentile of at least one value."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        median=statistics.median(ordered),
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        samples=len(ordered),
    )
