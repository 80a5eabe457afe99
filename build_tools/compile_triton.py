# SPDX-License-Identifier: Apache-2.0
"""Triton kernels ahead of time: one subprocess per kernel, no GPU, no driver."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import toolchain
from build_tools.errors import CompileError
from build_tools.expand import Job


@dataclass(frozen=True)
class Compiled:
    """A compiler's output: the cubin, its PTX and what the compiler says about the kernel."""

    cubin: bytes
    ptx: str
    meta: dict[str, Any]


def environment(scratch: Path) -> dict[str, str]:
    """The environment that makes Triton's output a function of the sources alone."""
    ptxas = str(toolchain.triton_bin("ptxas"))
    # Settings a developer may have exported (TRITON_DEBUG, TRITON_INTERPRET, PTXAS options) must not reach the code.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PTXAS_", "NVPTX_"))}
    root = str(Path(__file__).resolve().parent.parent)
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Both: the "blackwell" ptxas is of CUDA 13, whose cubins need driver R580.
        "TRITON_PTXAS_PATH": ptxas,
        "TRITON_PTXAS_BLACKWELL_PATH": ptxas,
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TRITON_HOME": str(scratch),
    }


def compile_job(job: Job, kernels: Path) -> Compiled:
    """Compiles a job whose source lies under `kernels`. Raises CompileError with the compiler's message."""
    with tempfile.TemporaryDirectory(prefix="sagert-build-") as name:
        scratch = Path(name)
        request = {
            **dataclasses.asdict(job),
            "folder": str((kernels / job.source.partition(":")[0]).parent.resolve()),
            "out": name,
            "ptxas": str(toolchain.triton_bin("ptxas")),
        }
        done = subprocess.run(
            [sys.executable, "-m", "build_tools.triton_worker"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment(scratch),
        )
        if done.returncode != 0:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-40:])
            raise CompileError(f"{job.arch}: {job.symbol} ({job.source}): Triton ended with {done.returncode}:\n{tail}")
        meta = json.loads((scratch / "meta.json").read_text())
        return Compiled((scratch / "kernel.cubin").read_bytes(), (scratch / "kernel.ptx").read_text(), meta)
