# SPDX-License-Identifier: Apache-2.0
"""The GPU tests' cases, oracle and checks, here on the CPU."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "benchmarks")]
