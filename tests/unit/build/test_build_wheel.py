# SPDX-License-Identifier: Apache-2.0
"""check-wheel finds every kind of damage in a wheel."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("elftools")
pytest.importorskip("ziglang")

from build_tools import wheel_check
from build_tools.wheel_check import LIBRARY, TAG, WheelError, check_wheel

ROOT = Path(__file__).resolve().parents[3]
INFO = "sagert-0.1.0.dist-info/"
CUBIN = b"\x7fELF cubin"
PTX = b".version 8.8\n.target sm_80\n\0"
HEADER = "SAGERT_API const char* sagert_version(void);\nSAGERT_API sagert_status sagert_close(\n    int x);\n"


def _library(folder: Path, *extra: str, exported: str = "sagert_close", target: str = "x86_64-linux-gnu.2.28") -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    digest = ",".join(str(byte) for byte in hashlib.sha256(CUBIN).digest())
    (folder / "lib.cc").write_text(
        "#include <math.h>\n"
        f"__attribute__((used)) static const unsigned char digest[] = {{{digest}}};\n"
        f'extern "C" int sagert_version(double x) {{ return (int)fmod(x, 2.0) + digest[(int)x]; }}\n'
        f'extern "C" int {exported}() {{ return 0; }}\n'
    )
    out = folder / "lib.so"
    command = [
        sys.executable,
        str(ROOT / "build_tools" / "zig_cxx.py"),
        "-target",
        target,
        "-O1",
        "-shared",
        "-nostdlib++",
    ]
    subprocess.run([*command, *extra, str(folder / "lib.cc"), "-o", str(out)], check=True, capture_output=True)
    return out.read_bytes()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small library that exports what HEADER declares and knows CUBIN."""
    return _library(tmp_path_factory.mktemp("library"))


def _entry(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


@pytest.fixture
def make(tmp_path: Path, kernels: Path, library: bytes) -> Callable[..., Callable[[], str]]:
    """make(tag=, drop=, replace=, add=, record=) -> a function that checks the wheel so made."""

    def build(
        tag: str = TAG,
        drop: str = "",
        replace: dict[str, bytes] | None = None,
        add: dict[str, bytes] | None = None,
        record: Callable[[list[str]], list[str]] = lambda lines: lines,
    ) -> Callable[[], str]:
        sha256 = hashlib.sha256(CUBIN).hexdigest()
        index = {"rows": [{"id": "sm80.tiny.int8_fp16"}], "kernels": [{"file": "k.cubin", "sha256": sha256}]}
        files = {
            "sagert/__init__.py": b"",
            LIBRARY: library,
            "sagert/bundles/sm80/k.cubin": CUBIN,
            "sagert/bundles/sm80/index.json": json.dumps(index).encode(),
            INFO + "WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n".encode(),
        }
        files.update(replace or {})
        lines = [_entry(name, data) for name, data in files.items()] + [INFO + "RECORD,,"]
        files.update(add or {})
        files.pop(drop, None)
        wheel = tmp_path / f"sagert-0.1.0-{tag}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
            archive.writestr(INFO + "RECORD", "\n".join(record(lines)) + "\n")
        header = tmp_path / "sagert.h"
        header.write_text(HEADER)
        return lambda: check_wheel(wheel, kernels, header)

    return build


Make = Callable[..., Callable[[], str]]


def test_good(make: Make) -> None:
    assert make()().endswith("1 cubins")


def _refused(check: Callable[[], str], message: str) -> None:
    with pytest.raises(WheelError, match=message):
        check()


def test_tag(make: Make) -> None:
    _refused(make(tag="cp311-cp311-linux_x86_64"), "tag: the file is called")
    _refused(make(tag="cp311-cp311-linux_x86_64"), "tag: WHEEL says cp311-cp311-linux_x86_64")


def test_bundles(make: Make) -> None:
    cubin = "sagert/bundles/sm80/k.cubin"
    _refused(make(drop=cubin), f"bundle: {cubin} is missing")
    _refused(make(drop="sagert/bundles/sm80/index.json"), r"bundle: .*index\.json is missing")
    _refused(make(replace={cubin: CUBIN[:-1]}), "does not have the sha256 its index.json says")
    _refused(make(replace={cubin: CUBIN[:-1]}), "is not the file libsagert was built for")
    _refused(make(replace={"sagert/bundles/sm80/more.cubin": CUBIN}), "more.cubin is in no index")
    digest = hashlib.sha256(PTX).hexdigest()
    kernels = [{"file": "k.cubin", "sha256": digest}]
    index = json.dumps({"rows": [{"id": "sm80.tiny.int8_fp16"}], "kernels": kernels}).encode()
    _refused(make(replace={cubin: PTX, "sagert/bundles/sm80/index.json": index}), "k.cubin is no machine code")
    _refused(make(replace={"sagert/bundles/sm80/index.json": b"{"}), r"index\.json cannot be read")
    other = json.dumps({"rows": [], "kernels": []}).encode()
    _refused(make(replace={"sagert/bundles/sm80/index.json": other}), r"has rows \[\], the manifest \['sm80")


def test_record(make: Make) -> None:
    _refused(make(record=lambda lines: lines[1:]), "RECORD: sagert/__init__.py is not listed")
    _refused(make(drop="sagert/__init__.py"), "RECORD: sagert/__init__.py is listed and not in the wheel")
    _refused(make(add={"sagert/__init__.py": b"import os"}), "RECORD: sagert/__init__.py has another hash")
    _refused(make(record=lambda lines: ["bad", *lines]), "RECORD: malformed line 'bad'")


def test_library_is_there_and_one(make: Make) -> None:
    _refused(make(drop=LIBRARY), "library: .* is missing")
    _refused(make(replace={LIBRARY: b"MZ"}), "library: .* is no ELF file")


def test_exports(make: Make, tmp_path: Path) -> None:
    check = make(replace={LIBRARY: _library(tmp_path / "a", exported="leaked")})
    _refused(check, "sagert_close is declared and not exported")
    _refused(check, "leaked is exported and not declared")


def test_linkage(make: Make, tmp_path: Path) -> None:
    _library(tmp_path / "libcudart", "-Wl,-soname,libcudart.so.12")
    path = str(tmp_path / "libcudart" / "lib.so")
    linked = _library(tmp_path / "b", "-Wl,--no-as-needed", path, "-Wl,-rpath,/opt/lib")
    _refused(make(replace={LIBRARY: linked}), r"library: linked to libcudart\.so\.12; only libc")
    _refused(make(replace={LIBRARY: linked}), "library: has RUNPATH")
    newer = _library(tmp_path / "c", target="x86_64-linux-gnu.2.39")
    _refused(make(replace={LIBRARY: newer}), r"library: needs GLIBC_2\.38 of libm\.so\.6, at most 2\.28")


def test_size_and_damage(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_check, "MAX_BYTES", 100)
    check = make()
    _refused(check, r"size: \d+ bytes, at most 100")
    (wheel,) = tmp_path.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-40])
    _refused(check, "cannot be read")


def test_shipped_header_is_understood() -> None:
    names = wheel_check.declared_functions(ROOT / "include" / "sagert.h")
    assert {"sagert_version", "sagert_select", "sagert_attention", "sagert_explain"} <= names
