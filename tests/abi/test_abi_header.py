# SPDX-License-Identifier: Apache-2.0
"""The header, the library's exports and the ctypes mirror agree."""

import ctypes
import re
import shutil
import subprocess

import pytest

from tests.kit import abi, fake_build

HEADER = fake_build.ROOT / "include/sagert.h"


def _compile(command, source, tmp_path, suffix):
    path = tmp_path / f"probe{suffix}"
    path.write_text(source)
    program = tmp_path / "probe"
    subprocess.run([*command, f"-I{HEADER.parent}", str(path), "-o", str(program)], check=True)
    return program


def test_layout_equals_the_mirror(compiler, tmp_path):
    lines = []
    for name, struct in abi.STRUCTS.items():
        lines.append(f'printf("%s %zu\\n", "{name}", sizeof({name}));')
        for field in struct._fields_:
            member = f"{name}.{field[0]}"
            lines.append(f'printf("%s %zu\\n", "{member}", offsetof({name}, {field[0]}));')
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <sagert.h>\nint main(void) {" + "\n".join(lines)
    program = _compile(
        [*fake_build.c_compiler(compiler), "-std=c99", "-Wall", "-Werror"], source + "return 0;}", tmp_path, ".c"
    )
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    actual = dict(line.split() for line in printed.splitlines())
    expected = {}
    for name, struct in abi.STRUCTS.items():
        expected[name] = str(ctypes.sizeof(struct))
        expected |= {f"{name}.{field[0]}": str(getattr(struct, field[0]).offset) for field in struct._fields_}
    assert actual == expected


@pytest.mark.parametrize("standard", ["c99", "c11", "c++11", "c++17", "c++20"])
def test_header_compiles_alone(compiler, tmp_path, standard):
    is_cpp = "++" in standard
    command = compiler if is_cpp else fake_build.c_compiler(compiler)
    command = [*command, f"-std={standard}", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    _compile(command, "#include <sagert.h>\nint main(void) { return 0; }\n", tmp_path, ".cc" if is_cpp else ".c")


def test_exports_are_the_header(any_library):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    declared = set(re.findall(r"SAGERT_API [^;(]*?(sagert_\w+)\(", HEADER.read_text()))
    output = subprocess.run([nm, "-D", "--defined-only", any_library], check=True, capture_output=True, text=True)
    exported = {line.split()[-1].split("@")[0] for line in output.stdout.splitlines() if line}
    ours = {name for name in exported if name.startswith("sagert_")}
    assert ours == declared
    if "sagert-tests" not in str(any_library):  # the fake build keeps the weak symbols of inline C++ code
        assert exported == declared


def test_versions(lib):
    assert lib.c.sagert_version() == b"0.1.0"
    assert lib.c.sagert_abi_version() == 1
    assert "SAGERT_ABI_VERSION 1u" in HEADER.read_text()


@pytest.mark.parametrize("name", ["request", "device", "selection", "row", "bundle", "args"])
def test_short_structs_are_refused_and_long_ones_accepted(lib, name):
    def call(size):
        req, dev, sel, row, bundle = abi.request(), abi.device(), abi.Selection(), abi.Row(), abi.Bundle()
        args = abi.attention_args(batch=0)
        target = {"request": req, "device": dev, "selection": sel, "row": row, "bundle": bundle, "args": args}[name]
        target.struct_size = size
        by = ctypes.byref
        if name == "row":
            return lib.c.sagert_row_get(0, by(row))
        if name == "bundle":
            return lib.c.sagert_bundle_get(0, by(bundle))
        if name == "args":
            return lib.c.sagert_attention(by(args))
        return lib.c.sagert_select(by(req), by(dev), by(sel))

    structs = {"request": abi.Request, "device": abi.Device, "selection": abi.Selection, "row": abi.Row}
    size = ctypes.sizeof(structs.get(name, abi.Bundle if name == "bundle" else abi.AttentionArgs))
    for short in (0, 8, size - 1):
        assert call(short) == abi.INVALID_ARGUMENT
        assert f"{name}.struct_size is {short}" in lib.error()
    assert call(size) in ((abi.OK, abi.NO_DRIVER) if name == "args" else (abi.OK,))
    assert call(size + 64) in ((abi.OK, abi.NO_DRIVER) if name == "args" else (abi.OK,))


def test_null_pointers_are_refused(lib):
    c = lib.c
    by = ctypes.byref
    calls = [
        lambda: c.sagert_attention(None),
        lambda: c.sagert_workspace_size(by(abi.attention_args()), None),
        lambda: c.sagert_select(None, by(abi.device()), by(abi.Selection())),
        lambda: c.sagert_select(by(abi.request()), None, by(abi.Selection())),
        lambda: c.sagert_select(by(abi.request()), by(abi.device()), None),
        lambda: c.sagert_explain(by(abi.request()), by(abi.device()), None, ctypes.c_uint64(0), None),
        lambda: c.sagert_explain(by(abi.request()), by(abi.device()), None, ctypes.c_uint64(9), None),
        lambda: c.sagert_driver_version(None),
        lambda: c.sagert_device_count(None),
        lambda: c.sagert_row_get(0, None),
        lambda: c.sagert_bundle_get(0, None),
        lambda: c.sagert_row_get(-1, by(abi.Row())),
        lambda: c.sagert_row_get(10_000, by(abi.Row())),
        lambda: c.sagert_bundle_get(10_000, by(abi.Bundle())),
        lambda: c.sagert_bundle_verify(-1),
    ]
    for call in calls:
        assert call() == abi.INVALID_ARGUMENT
        assert lib.error()


def test_explain_cuts_at_capacity(lib):
    required = ctypes.c_uint64()
    args = (ctypes.byref(abi.request()), ctypes.byref(abi.device()))
    buffer = ctypes.create_string_buffer(b"x" * 32, 32)
    assert lib.c.sagert_explain(*args, buffer, ctypes.c_uint64(16), ctypes.byref(required)) == abi.OK
    assert buffer.raw[:16] == b'{"request": {"b' + b"\0"
    assert buffer.raw[16:] == b"x" * 16
    assert required.value > 100


def test_sha256_against_fips_vectors(compiler, tmp_path):
    """FIPS 180-4 examples, and every length around the padding's edges against hashlib."""
    import hashlib

    source = """
#include <cstdio>
#include <string>
#include "sha256.h"
int main() {
  auto show = [](const std::string& s) {
    auto d = sagert::sha256(s.data(), s.size());
    std::printf("%s\\n", sagert::to_hex(d.data(), d.size()).c_str());
  };
  show("");
  show("abc");
  show("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq");
  show(std::string(1000000, 'a'));
  for (int i = 0; i < 300; ++i) show(std::string(i, 'q'));
}
"""
    host = fake_build.ROOT / "host"
    program = _compile([*compiler, "-std=c++17", f"-I{host}", str(host / "sha256.cc")], source, tmp_path, ".cc")
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert lines[:4] == [
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
    ]
    assert lines[4:] == [hashlib.sha256(b"q" * i).hexdigest() for i in range(300)]
