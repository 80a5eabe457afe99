# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ to cubin through NVRTC: needs no nvcc, no host compiler, no GPU and no driver."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from build_tools import toolchain
from build_tools.compile_triton import Compiled
from build_tools.errors import BuildError, CompileError
from build_tools.expand import Job


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    folder = toolchain.nvidia_root() / "cuda_nvrtc" / "lib"
    libraries = sorted(path for path in folder.glob("libnvrtc.so.1*") if "alt" not in path.name)
    if not libraries:
        raise BuildError(f"no libnvrtc in {folder}: reinstall nvidia-cuda-nvrtc-cu12")
    library = ctypes.CDLL(str(libraries[0]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _ok(status: int) -> None:
    if status != 0:
        raise BuildError(f"NVRTC failed: {_nvrtc().nvrtcGetErrorString(status).decode()}")


def _text(program: ctypes.c_void_p, size: str, get: str) -> bytes:
    library, length = _nvrtc(), ctypes.c_size_t()
    _ok(getattr(library, size)(program, ctypes.byref(length)))
    buffer = ctypes.create_string_buffer(max(length.value, 1))
    if length.value:
        _ok(getattr(library, get)(program, buffer))
    return buffer.raw[: length.value]


def options(job: Job, kernels: Path) -> list[str]:
    """NVRTC's command line for a job."""
    root = toolchain.nvidia_root()
    headers = [root / "cuda_runtime" / "include", root / "cuda_cccl" / "include"]
    found = [f"--gpu-architecture={job.target}", "--std=c++17", "--restrict", "-default-device"]
    found += [f"-I{folder}" for folder in (kernels / "common", kernels, *headers) if folder.is_dir()]
    if job.max_registers is not None:
        found.append(f"--maxrregcount={job.max_registers}")
    for name, value in job.constants:
        found.append(f"-D{name}={int(value) if isinstance(value, bool) else value}")
    for name, kind in job.args:
        if kind.startswith("*"):
            found.append(f"-D{name.upper()}_{kind[1:].upper()}=1")
        elif kind == "tensormap":
            found.append(f"-D{name.upper()}_TENSORMAP=1")
    return found


def compile_job(job: Job, kernels: Path) -> Compiled:
    """Compiles a job whose source lies under `kernels`. Raises CompileError with NVRTC's log."""
    library = _nvrtc()
    file = job.source.partition(":")[0]
    program = ctypes.c_void_p()
    source = (kernels / file).read_bytes()
    # The name given to NVRTC ends up in no cubin (no line info), but in messages.
    _ok(library.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), 0, None, None))
    try:
        flags = [flag.encode() for flag in (*options(job, kernels), f"-I{(kernels / file).parent}")]
        status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        if status != 0:
            log = (
                _text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0\n").decode(errors="replace")
            )
            raise CompileError(f"{job.arch}: {job.label} ({job.source}) for {job.target}: NVRTC refused it:\n{log}")
        cubin = _text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        ptx = _text(program, "nvrtcGetPTXSize", "nvrtcGetPTX").rstrip(b"\0").decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    meta: dict[str, Any] = {
        "symbol": job.symbol,
        "num_warps": job.threads // 32,
        "shared": job.shared,
        "global_scratch": 0,
        "profile_scratch": 0,
        "tensor_descriptors": False,
    }
    return Compiled(cubin, ptx, meta)
