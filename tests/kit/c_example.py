# SPDX-License-Identifier: Apache-2.0
"""Builds examples/c/attention.c against a libsagert, with nothing but a C compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.kit import fake_build

SOURCE = fake_build.ROOT / "examples/c/attention.c"
FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic", "-Werror")


def build(library: Path, compiler: list[str], folder: Path) -> Path:
    """The program's path in `folder`; `compiler` is the C++ compiler whose C compiler is used."""
    program = folder / "attention"
    command = [*fake_build.c_compiler(compiler), *FLAGS, f"-I{fake_build.ROOT}/include", str(SOURCE)]
    command += ["-o", str(program), f"-L{library.parent}", "-lsagert", f"-Wl,-rpath,{library.parent}", "-lm", "-ldl"]
    subprocess.run(command, check=True)
    return program
