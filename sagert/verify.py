# SPDX-License-Identifier: Apache-2.0
"""verify: re-hashes every bundle file, and every file of the installation against the wheel's RECORD."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from sagert.errors import SagertError
from sagert.registry import bundles


def check_record() -> tuple[int, list[str]]:
    """Number of files whose RECORD hash was checked, and what is wrong with the others."""
    try:
        files = distribution("sagert").files or []
    except PackageNotFoundError:
        return 0, ["sagert is not installed from a wheel, so there is no RECORD to check against"]
    checked, problems = 0, []
    for file in files:
        if file.hash is None or file.hash.mode != "sha256" or file.suffix == ".pyc":
            continue
        checked += 1
        try:
            content = file.read_binary()
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
            continue
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if digest != file.hash.value:
            problems.append(f"{file}: sha256 is not the one the wheel recorded")
    return checked, problems


def verify() -> dict[str, Any]:
    """{"bundles": {name: problem or None}, "record": {"checked": files, "problems": [...]}, "ok": bool}."""
    checked, problems = check_record()
    try:
        state: dict[str, str | None] = {bundle.name: bundle.problem for bundle in bundles(verify=True)}
    except SagertError as error:
        state = {"library": str(error)}
    ok = not problems and all(problem is None for problem in state.values())
    return {"bundles": state, "record": {"checked": checked, "problems": problems}, "ok": ok}
