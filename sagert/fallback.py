# SPDX-License-Identifier: Apache-2.0
"""Falling back to torch's own attention: asked for by the caller, decided before launch, warned about and counted."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

from sagert.errors import InvalidArgumentError
from sagert.settings import SETTINGS

log = logging.getLogger("sagert")
MODES = ("error", "sdpa")

_lock = threading.Lock()
_counts: dict[str, int] = {}


class FallbackWarning(UserWarning):
    """A call ran on scaled_dot_product_attention instead of a quantized kernel."""


def use_sdpa(fallback: str) -> bool:
    """Whether `fallback`, or SAGERT_FALLBACK where it is set, allows scaled_dot_product_attention."""
    if fallback not in MODES:
        raise InvalidArgumentError(f"fallback={fallback!r} is not a fallback: use 'error' or 'sdpa'")
    return (SETTINGS.fallback or fallback) == "sdpa"


def record(reason: str) -> None:
    """Counts one fallback, and warns at the first one of each reason."""
    with _lock:
        count = _counts.get(reason, 0)
        _counts[reason] = count + 1
    if count == 0:
        message = f"sagert fell back to scaled_dot_product_attention: {reason}"
        log.warning(message)
        warnings.warn(message, FallbackWarning, stacklevel=3)


def stats() -> dict[str, Any]:
    """Counters of this process: {"fallbacks": {reason: calls}, "fallback_calls": total}."""
    with _lock:
        return {"fallback_calls": sum(_counts.values()), "fallbacks": dict(_counts)}
