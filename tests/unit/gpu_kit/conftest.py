# SPDX-License-Identifier: Apache-2.0
"""The GPU tests' cases, oracle and checks, here on the CPU."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Last, because a kernel's module has the name of a benchmark, too.
sys.path += [str(ROOT / "tests" / "gpu"), str(ROOT / "benchmarks")]
