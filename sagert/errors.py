# SPDX-License-Identifier: Apache-2.0
"""Exceptions of sagert. Each says what was asked, why it cannot be done, and what would make it work."""

from __future__ import annotations

import sys

__all__ = [
    "CudaError",
    "IntegrityError",
    "InternalError",
    "InvalidArgumentError",
    "NoDriverError",
    "OutOfMemoryError",
    "SagertError",
    "UnsupportedError",
    "out_of_memory_error",
]


class SagertError(Exception):
    """Base of every error sagert raises itself."""


class InvalidArgumentError(SagertError, ValueError):
    """The call is malformed; the message names the argument, its value and what is accepted."""


class UnsupportedError(SagertError, NotImplementedError):
    """The call is well formed, but no kernel row can serve it; the message lists the reasons of every row."""


class NoDriverError(SagertError, RuntimeError):
    """The NVIDIA driver is absent, too old, or has no device."""


class IntegrityError(SagertError, RuntimeError):
    """A file of the installation is missing, cut short, altered, or from another version."""


class CudaError(SagertError, RuntimeError):
    """The driver reported an error."""


class OutOfMemoryError(SagertError, MemoryError):
    """Device or host memory ran out; raised only where torch.OutOfMemoryError does not exist."""


class InternalError(SagertError, RuntimeError):
    """A bug in sagert."""


def out_of_memory_error(message: str) -> BaseException:
    """torch.OutOfMemoryError when torch is loaded and has it, so that callers' handlers work; else our own."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", OutOfMemoryError)
    error: BaseException = kind(message)
    return error
