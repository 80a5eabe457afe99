# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a process of its own whose NVIDIA driver is tests/abi/stub/libcuda.c."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.kit import fake_build

SOURCE = fake_build.ROOT / "tests/abi/stub/libcuda.c"

PREAMBLE = """\
import ctypes, json, os, sys
sys.path.insert(0, {root!r})
from tests.kit import abi
from tests.kit.abi import *
lib = abi.Library({library!r})
result = None
"""
EPILOGUE = "\nprint(json.dumps(result))\n"


class Stub:
    """A compiled stub driver."""

    def __init__(self, folder: Path, compiler: list[str], missing: str | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [*fake_build.c_compiler(compiler), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        command += [f"-D{missing}=absent_{missing}"] if missing else []
        subprocess.run([*command, str(SOURCE), "-o", str(folder / "libcuda.so.1")], check=True)

    def run(self, library: Path, code: str, log: Path | None = None, **env: Any) -> Any:
        """Runs `code`, which sets `result`, with `lib` loaded; returns the result."""
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder), **{k: str(v) for k, v in env.items()}}
        types = library.parent.parent / "types.txt"
        if types.exists():
            environment.setdefault("STUB_TYPES", str(types))
        if log is not None:
            environment["STUB_LOG"] = str(log)
        program = PREAMBLE.format(root=str(fake_build.ROOT), library=str(library)) + code + EPILOGUE
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        if done.returncode != 0:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def calls(log: Path, name: str) -> list[str]:
    """The log's lines of one driver function."""
    if not log.exists():
        return []
    return [line for line in log.read_text().splitlines() if line.split()[0] == name]
