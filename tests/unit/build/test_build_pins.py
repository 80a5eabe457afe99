# SPDX-License-Identifier: Apache-2.0
"""The places that name the pinned tools agree."""

from __future__ import annotations

from pathlib import Path

from build_tools import toolchain
from build_tools.schema import read_toml

ROOT = Path(__file__).resolve().parents[3]


def _requirements() -> list[str]:
    return list(read_toml(ROOT / "pyproject.toml", "pyproject.toml")["build-system"]["requires"])


def test_pyproject_and_requirements_file_agree() -> None:
    lines = (ROOT / "requirements-build.txt").read_text().splitlines()
    listed = [line.replace('"', "'") for line in lines if line and not line.startswith("#")]
    assert listed == _requirements()


def test_toolchain_and_pyproject_agree() -> None:
    assert f"triton=={toolchain.TRITON}" in _requirements()
    assert any(name.startswith(f"nvidia-cuda-nvrtc-cu12=={toolchain.TOOLKIT}.") for name in _requirements())
