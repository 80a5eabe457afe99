# SPDX-License-Identifier: Apache-2.0
"""Builds libsagert through CMake for a development tree: <out>/lib/libsagert.so beside <out>/bundles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_tools.bundle import write_file
from build_tools.errors import BuildError


def _tool(name: str) -> str:
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        raise BuildError(f"{name} is not installed: pip install {name}")
    return found


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command[:3])} failed:\n{(done.stdout + done.stderr).strip()}")


def build_library(root: Path, out: Path, table: Path, cache: Path, build: Path | None = None) -> Path:
    """Compiles the host code of `root` with the kernel table, in `build` (default: OUT/../cmake); returns the library's
    path."""
    build = build or out.parent / "cmake"
    environment = {**os.environ, "SAGERT_BUILD_CACHE": str(cache.resolve())}
    definitions = {
        "SAGERT_BUILD_BUNDLES": "OFF",
        "SAGERT_KERNEL_TABLE": str(table.resolve()),
        "SAGERT_PYTHON": sys.executable,
        "CMAKE_MAKE_PROGRAM": _tool("ninja"),
        "CMAKE_BUILD_TYPE": "Release",
    }
    cmake = _tool("cmake")
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    if not (build / "build.ninja").is_file():
        _run([cmake, "-S", str(root), "-B", str(build), "-G", "Ninja", *flags], environment)
    else:
        _run([cmake, str(build), *flags], environment)
    _run([cmake, "--build", str(build)], environment)
    library = out / "lib" / "libsagert.so"
    write_file(library, (build / "libsagert.so").read_bytes())
    return library
