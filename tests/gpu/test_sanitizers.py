# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer's tools on a small problem for each kernel of every row."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FAILED = 99  # an exit status that Python does not use


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_reports_nothing(tool: str, here: list[Any], tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, which comes with the CUDA Toolkit, is not on PATH")
    paths = [str(HERE.parents[1] / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    failures = []
    for family in dict.fromkeys(row.family for row in here):
        done = subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", str(FAILED), "--print-limit", "8", sys.executable,
             HERE / "sanitized.py", *(row.id for row in here if row.family == family)],
            cwd=tmp_path,  # not the clone, whose sagert has no library
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )  # fmt: skip
        if done.returncode:
            failures.append(f"{family}: exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    assert not failures, "\n".join(failures)
