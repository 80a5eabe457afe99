# SPDX-License-Identifier: Apache-2.0
"""examples/c/attention.c, built against the installed library and run on this GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import sagert
from sagert import native

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c99", "-O2", "-Wall", "-Wextra"]


def c_compilers() -> list[list[str]]:
    """The system's C compiler and zig's, as far as they are there."""
    import shutil

    found = [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        found.append([sys.executable, "-m", "ziglang", "cc"])
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compilers = c_compilers()
    if not compilers:
        pytest.skip("no C compiler: install gcc, clang or ziglang")
    library = native.library_path().resolve()
    out = tmp_path_factory.mktemp("c-example") / "attention"
    command = [*compilers[0], *FLAGS, f"-I{ROOT}/include", str(ROOT / "examples/c/attention.c"), "-o", str(out)]
    command += [f"-L{library.parent}", "-lsagert", f"-Wl,-rpath,{library.parent}", "-lm", "-ldl"]
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_c_example_agrees_with_float64(program: Path, served: list[str], dtype: str, mask: str) -> None:
    rows = {row.id: row for row in sagert.kernels()}
    for precision in ["auto", *served]:
        done = subprocess.run([program, precision, dtype, mask], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{precision}: {done.stdout}{done.stderr}"
        row = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("row "))
        assert ("give the same output" in done.stdout) == ("quantized_kv" in rows[row].flags)
