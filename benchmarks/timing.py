# SPDX-License-Identifier: Apache-2.0
"""Times CUDA work with events, all contenders in turn so that clocks and heat are shared fairly."""

from __future__ import annotations

import math
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


def measure(calls: dict[str, Call], rounds: int, sample_ms: float = 10.0) -> dict[str, Timing]:
    """Times every call.

    Args:
        calls: name -> function that launches the work on the current stream.
        rounds: samples per call; each round takes one sample of every call.
        sample_ms: how long one sample should last.

    Returns:
        name -> Timing.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        elapsed(call, 3)  # warms up: loads kernels, fills caches, raises clocks
        repeats[name] = max(1, math.ceil(sample_ms / max(elapsed(call, 3), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(elapsed(call, repeats[name]))
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
