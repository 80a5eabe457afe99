# SPDX-License-Identifier: Apache-2.0
"""Puts the portable kernels on the path and makes Triton interpret them on the CPU."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "portable"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import interpreter_fixes

interpreter_fixes.install()
