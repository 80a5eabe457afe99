# SPDX-License-Identifier: Apache-2.0
"""What the machine and the Python environment are, for doctor; nothing here imports torch or the other packages."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sagert.settings import VARIABLES

# Distributions whose presence matters when attention misbehaves.
OTHER_PACKAGES = (
    "sageattention",
    "sageattn3",
    "spas-sage-attn",
    "flash-attn",
    "flash-attn-3",
    "flash_attn_interface",
    "xformers",
    "comfy-kitchen",
    "flashinfer-python",
    "nvidia-cudnn-frontend",
    "triton",
    "triton-windows",
)


def platform_facts() -> dict[str, Any]:
    """Operating system, machine, C library, and the Python that runs."""
    libc = " ".join(part for part in platform.libc_ver() if part) if sys.platform == "linux" else ""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "libc": libc or None,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
    }


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_facts() -> dict[str, Any]:
    """torch's version and CUDA version; imports torch, keeping the error when that fails."""
    found = installed_version("torch")
    facts: dict[str, Any] = {"installed": found, "version": None, "cuda": None, "cuda_available": None, "error": None}
    if found is None:
        facts["error"] = "not installed: attention() needs it; doctor, explain and the C library do not"
        return facts
    try:
        import torch

        facts["version"] = str(torch.__version__)
        facts["cuda"] = torch.version.cuda
        facts["cuda_available"] = torch.cuda.is_available()
    except Exception as error:  # a torch that does not import is a finding, not a failure of doctor
        facts["error"] = f"{type(error).__name__}: {error}"
    return facts


def other_packages() -> dict[str, str]:
    """Other attention packages installed here."""
    found = {name: installed_version(name) for name in OTHER_PACKAGES}
    return {name: value for name, value in found.items() if value is not None}


def variables() -> list[dict[str, Any]]:
    """Every SAGERT_* variable: those sagert reads, and any other that is set (probably a typing error)."""
    known = [
        {"name": name, "value": os.environ.get(name), "meaning": meaning, "accepted": list(accepted)}
        for name, (meaning, accepted) in VARIABLES.items()
    ]
    unknown = [
        {"name": name, "value": os.environ[name], "meaning": "not a variable of sagert", "accepted": []}
        for name in sorted(os.environ)
        if name.startswith("SAGERT_") and name not in VARIABLES
    ]
    return known + unknown
