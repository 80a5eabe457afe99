# SPDX-License-Identifier: Apache-2.0
"""Finds the pinned build-time tools among the installed packages and names their versions."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from build_tools.errors import BuildError

TOOLKIT = "12.9"
TRITON = "3.9.0"
_NVRTC_PACKAGE = "nvidia-cuda-nvrtc-cu12"


@functools.cache
def triton_bin(name: str) -> Path:
    """A binary of the triton package: ptxas, nvdisasm or cuobjdump."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise BuildError(f"triton is not installed: pip install triton=={TRITON}")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise BuildError(f"the installed triton has no {name}: pip install --force-reinstall triton=={TRITON}")
    return path


@functools.cache
def triton_version() -> str:
    """Version of triton and of its ptxas; refuses versions other than the pinned ones."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        found = "no version"
    if found != TRITON:
        raise BuildError(f"triton {TRITON} is needed and {found} is installed: pip install triton=={TRITON}")
    text = subprocess.run([str(triton_bin("ptxas")), "--version"], capture_output=True, text=True, check=True).stdout
    build = text.strip().splitlines()[-1]
    if f"cuda_{TOOLKIT}" not in build:
        raise BuildError(f"triton's ptxas is {build}, not of CUDA {TOOLKIT}: pip install triton=={TRITON}")
    return f"triton {found}, ptxas {build}"


@functools.cache
def nvidia_root() -> Path:
    """The `nvidia` folder of the installed CUDA packages."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "cuda_nvrtc").is_dir():
            return Path(folder)
    raise BuildError(f"NVRTC is not installed: pip install '{_NVRTC_PACKAGE}=={TOOLKIT}.*'")


@functools.cache
def nvrtc_version() -> str:
    """Version of NVRTC; refuses toolkits other than the pinned one."""
    nvidia_root()
    found = version(_NVRTC_PACKAGE)
    if not found.startswith(TOOLKIT + "."):
        raise BuildError(
            f"NVRTC {TOOLKIT} is needed, {found} is installed: pip install '{_NVRTC_PACKAGE}=={TOOLKIT}.*'"
        )
    headers = []
    for package in ("nvidia-cuda-runtime-cu12", "nvidia-cuda-cccl-cu12"):
        try:
            headers.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            headers.append(f"no {package}")
    return ", ".join([f"nvrtc {found}", *headers])
