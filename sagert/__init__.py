# SPDX-License-Identifier: Apache-2.0
"""Quantized attention for NVIDIA GPUs from prebuilt kernels: no compiler, CUDA toolkit or Triton on your machine.

    out = sagert.attention(q, k, v, precision="int8_fp8")

Importing this module loads neither torch nor CUDA; `python -m sagert doctor` says what this machine can run.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sagert import errors

if TYPE_CHECKING:
    from sagert.api import attention as attention
    from sagert.fallback import stats as stats
    from sagert.kv import QuantizedKV as QuantizedKV
    from sagert.packed import attention_varlen as attention_varlen
    from sagert.quantized import quantize_kv as quantize_kv
    from sagert.registry import Device as Device
    from sagert.registry import Row as Row
    from sagert.registry import Selection as Selection
    from sagert.registry import explain as explain
    from sagert.registry import kernels as kernels

    __version__: str

__all__ = [
    "Device",
    "QuantizedKV",
    "Row",
    "Selection",
    "__version__",
    "attention",
    "attention_varlen",
    "errors",
    "explain",
    "kernels",
    "quantize_kv",
    "stats",
]

logging.getLogger("sagert").addHandler(logging.NullHandler())

_LAZY = {
    "attention": "sagert.api",
    "attention_varlen": "sagert.packed",
    "quantize_kv": "sagert.quantized",
    "QuantizedKV": "sagert.kv",
    "stats": "sagert.fallback",
    "Device": "sagert.registry",
    "Row": "sagert.registry",
    "Selection": "sagert.registry",
    "explain": "sagert.registry",
    "kernels": "sagert.registry",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from sagert.version import version

        value: Any = version()
    elif name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'sagert' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
