# SPDX-License-Identifier: Apache-2.0
"""GPU tests: marked `gpu`, visibly skipped where no GPU can run sagert; --record PATH writes what they measured."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SEED = 41

# The installed wheel is tested, so the clone's own sagert, which has no library beside it, must not come first.
# benchmarks/ says what a result was measured on.
KEPT = [p for p in sys.path if Path(p).resolve() != HERE.parents[1]]
sys.path[:] = [str(HERE), str(HERE.parents[1] / "benchmarks"), *KEPT]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", default=None, metavar="PATH", help="write the GPU tests' measurements as JSON")
    parser.addoption("--seed", default=SEED, type=int, help="of the random requests (default: %(default)s)")


def skip_reason() -> str | None:
    """Why no GPU test can run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device that torch can use"
    if torch.version.hip:
        return "this torch is built for ROCm; sagert serves NVIDIA GPUs"
    return None if precisions() else "no kernel row serves this device (python -m sagert doctor says why)"


def rows() -> list[Any]:
    """The rows for the current device, best rank first."""
    import torch

    import sagert

    capability = torch.cuda.get_device_capability()
    here = [r for r in sagert.kernels() if r.capability_min <= capability <= r.capability_max]
    return sorted(here, key=lambda r: r.rank)


def precisions() -> list[str]:
    """The precisions that have a row for the current device, best rank first."""
    return list(dict.fromkeys(r.precision for r in rows()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if not mine:
        return
    reason = skip_reason()
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def served() -> list[str]:
    return precisions()


@pytest.fixture(scope="session")
def tolerance() -> dict[str, float]:
    """Precision -> the tolerated relative L1 error on N(0, 1) that its row for this device states."""
    return {r.precision: r.relative_l1 for r in reversed(rows())}


@pytest.fixture(scope="session")
def here() -> list[Any]:
    """The rows for this device, best rank first."""
    return rows()


@pytest.fixture(scope="session")
def info() -> Any:
    """This device, as selection sees it."""
    from sagert.registry import current_device

    return current_device()


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed", default=SEED))


class Record:
    """Measurements of the session on N(0, 1) inputs, by suite (which test took them) and precision."""

    def __init__(self) -> None:
        self.started = time.time()
        self.points: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def add(self, suite: str, precision: str, **point: Any) -> None:
        self.points.setdefault(suite, {}).setdefault(precision, []).append(point)

    def summary(self) -> dict[str, Any]:
        from report import clocks, environment

        return {
            "environment": environment(),
            "clocks_after": clocks(),
            "seconds": round(time.time() - self.started, 1),
            "measure": "relative L1 against exact float64 attention on N(0,1) inputs",
            "suites": {
                suite: {precision: summary(points) for precision, points in found.items()}
                for suite, found in self.points.items()
            },
        }


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """One suite's points of one precision; against_reference is there where the suite measured it."""
    large = [p for p in points if p["outputs"] >= 4096] or points
    worst = max(large, key=lambda p: p["relative_l1"])
    out = {
        "cases": len(points),
        "cases_with_4096_outputs": len(large),
        "relative_l1_median": statistics.median(p["relative_l1"] for p in large),
        "relative_l1_max": worst["relative_l1"],
        "worst_case": worst["case"],
        "cosine_min": min(p["cosine"] for p in large),
        "lse_error_max": max(p["lse_error"] for p in points),
    }
    near = [p["against_reference"] for p in large if "against_reference" in p]
    return out | ({"against_reference_max": max(near)} if near else {})


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    kept = Record()
    yield kept
    path = request.config.getoption("--record", default=None)
    if path and kept.points:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(kept.summary(), indent=1) + "\n", encoding="utf-8")
