# SPDX-License-Identifier: Apache-2.0
"""Chooses the sagert package that the tests import.

The installed wheel where there is one; else the source package with the development build's library and bundles beside
it, copied together, because the package loads nothing from outside its own folder; else the bare source package, on
which the tests that need the library are skipped.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _installed() -> Path | None:
    for distribution in importlib.metadata.distributions(name="sagert"):
        root = Path(str(distribution.locate_file(""))).resolve()
        if root != REPOSITORY and (root / "sagert" / "lib").is_dir():
            return root
    return None


def _staged() -> Path | None:
    build = REPOSITORY / "build" / "sagert"
    if not any((build / "lib").glob("*sagert*")):
        return None
    root = Path(tempfile.mkdtemp(prefix="sagert-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    shutil.copytree(REPOSITORY / "sagert", root / "sagert", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("lib", "bundles"):
        if (build / part).is_dir():
            shutil.copytree(build / part, root / "sagert" / part)
    return root


ROOT = _installed() or _staged() or REPOSITORY
if ROOT != REPOSITORY and "sagert" not in sys.modules:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def package_root() -> Path:
    """Folder that holds the sagert package under test."""
    return ROOT


@pytest.fixture(scope="session")
def subprocess_environment() -> dict[str, str]:
    """Environment in which a new Python imports the package under test, with no SAGERT_ variable set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAGERT_")}
    environment["PYTHONPATH"] = str(ROOT)
    return environment


@pytest.fixture(scope="session")
def library() -> None:
    """Skips where the package has no library."""
    if not (ROOT / "sagert" / "lib").is_dir():
        pytest.skip("no libsagert: install the wheel or run python -m build_tools all")
