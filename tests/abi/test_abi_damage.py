# SPDX-License-Identifier: Apache-2.0
"""Every file of every bundle cut short, altered, missing or exchanged: always an integrity error that names it."""

import ctypes
import json
import shutil
from pathlib import Path

import pytest

from tests.kit import abi


@pytest.fixture(scope="module")
def installed(any_library, tmp_path_factory):
    """A copy of the library and its bundles, and the library loaded from there."""
    root = tmp_path_factory.mktemp("installed")
    (root / "lib").mkdir()
    shutil.copy2(any_library, root / "lib" / "libsagert.so")
    shutil.copytree(any_library.parent.parent / "bundles", root / "bundles")
    return abi.Library(root / "lib" / "libsagert.so")


def _verify(lib, index):
    status = lib.c.sagert_bundle_verify(index)
    return status, lib.error() if status != abi.OK else ""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def _remove(path: Path) -> None:
    path.unlink()


def _swap(path: Path) -> None:
    other = next(p for p in sorted(path.parent.glob("*.cubin")) if p.read_bytes() != path.read_bytes())
    shutil.copyfile(other, path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_undamaged(installed):
    assert installed.bundles()
    for index, (name, path) in enumerate(installed.bundles()):
        assert _verify(installed, index) == (abi.OK, "")
        assert Path(path).is_absolute()
        assert Path(path).name == name
        assert len(json.loads((Path(path) / "index.json").read_text())["kernels"]) == len(
            list(Path(path).glob("*.cubin"))
        )


@pytest.mark.parametrize("damage", [_cut, _empty, _grow, _flip, _remove, _swap, _folder])
def test_every_cubin(installed, damage):
    for index, (_, folder) in enumerate(installed.bundles()):
        for path in sorted(Path(folder).glob("*.cubin")):
            data = path.read_bytes()
            damage(path)
            status, text = _verify(installed, index)
            assert status == abi.INTEGRITY, path.name
            assert str(path) in text
            assert "reinstall" in text
            if path.is_dir():
                path.rmdir()
            path.write_bytes(data)
        assert _verify(installed, index)[0] == abi.OK


@pytest.mark.parametrize("damage", [_empty, _remove])
def test_index(installed, damage):
    for index, (_, folder) in enumerate(installed.bundles()):
        path = Path(folder) / "index.json"
        data = path.read_bytes()
        damage(path)
        status, text = _verify(installed, index)
        assert status == abi.INTEGRITY
        assert str(path) in text
        path.write_bytes(data)


def test_attention_with_damage(any_library, stub, tmp_path):
    """Through the whole call, with the driver present: repaired files load at the next call."""
    root = tmp_path / "installed"
    (root / "lib").mkdir(parents=True)
    shutil.copy2(any_library, root / "lib" / "libsagert.so")
    shutil.copytree(any_library.parent.parent / "bundles", root / "bundles")
    code = """
import pathlib
result = []
for _, folder in lib.bundles():
    for path in sorted(pathlib.Path(folder).glob("*.cubin")):
        path.rename(str(path) + ".away")
result.append([lib.attention(abi.attention_args(precision=INT8_FP16)), lib.error()])
for _, folder in lib.bundles():
    for path in sorted(pathlib.Path(folder).glob("*.cubin.away")):
        path.rename(str(path)[:-5])
result.append([lib.attention(abi.attention_args(precision=INT8_FP16)), ""])
"""
    result = stub.run(root / "lib/libsagert.so", code, STUB_CAPABILITY="90")
    assert result[0][0] == abi.INTEGRITY
    assert ".cubin" in result[0][1]
    assert result[1][0] == abi.OK
    assert ctypes.sizeof(abi.Selection) == 16
