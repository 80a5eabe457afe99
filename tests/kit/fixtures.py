# SPDX-License-Identifier: Apache-2.0
"""pytest fixtures: libsagert built around invented rows, and the real one where there is one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.kit import abi, fake_build
from tests.kit.stub import Stub


def find_real_library() -> Path | None:
    """The installed package's library, SAGERT_TEST_LIB, or the development tree's."""
    candidates = []
    spec = importlib.util.find_spec("sagert")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "lib" / "libsagert.so")
    if os.environ.get("SAGERT_TEST_LIB"):
        candidates.append(Path(os.environ["SAGERT_TEST_LIB"]))
    candidates.append(fake_build.ROOT / "build/sagert/lib/libsagert.so")
    return next((path for path in candidates if path.exists()), None)


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    found = fake_build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler: set CXX or install ziglang")
    return found


@pytest.fixture(scope="session")
def fake_library(compiler: list[str]) -> Path:
    return fake_build.cached(compiler)


@pytest.fixture(scope="session")
def lib(fake_library: Path) -> abi.Library:
    """The fake build, loaded into this process: for what needs no driver."""
    return abi.Library(fake_library)


@pytest.fixture(scope="session")
def real_library() -> Path:
    path = find_real_library()
    if path is None:
        pytest.skip("no built libsagert: install the wheel or run `python -m build_tools all`")
    return path


@pytest.fixture(scope="session", params=["fake", "real"])
def any_library(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_library")


@pytest.fixture(scope="session")
def stub(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return Stub(tmp_path_factory.mktemp("stub"), compiler)
