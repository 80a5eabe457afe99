# SPDX-License-Identifier: Apache-2.0
"""The SAGERT_* environment variables, read once. None of them selects code to load."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from sagert.codes import PRECISIONS

log = logging.getLogger("sagert")

VARIABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "SAGERT_LOG": ("level of the logger 'sagert', written to stderr", ("off", "info", "debug")),
    "SAGERT_FALLBACK": ("overrides every fallback= argument", ("error", "sdpa")),
    "SAGERT_PRECISION": ("what precision='auto' means", tuple(PRECISIONS)),
    "SAGERT_STRICT": ("1: wait for the GPU after every call, so that a fault shows where it happened", ("0", "1")),
}


@dataclass(frozen=True)
class Settings:
    """Values of the environment variables; None where one is unset."""

    log: str | None
    fallback: str | None
    precision: str | None
    strict: bool


def _read(name: str) -> str | None:
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return None
    accepted = VARIABLES[name][1]
    if value not in accepted:
        log.warning("%s=%r is ignored: use one of %s", name, value, ", ".join(accepted))
        return None
    return value


def _load() -> Settings:
    settings = Settings(_read("SAGERT_LOG"), _read("SAGERT_FALLBACK"), _read("SAGERT_PRECISION"), False)
    if settings.log in ("info", "debug"):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(settings.log.upper())
    return Settings(settings.log, settings.fallback, settings.precision, _read("SAGERT_STRICT") == "1")


SETTINGS = _load()
