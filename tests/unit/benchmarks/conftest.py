# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

# Last, because a kernel's module has the name of a benchmark, too.
sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
