# SPDX-License-Identifier: Apache-2.0
"""Makes libraries of PTX modules, and the emulating driver. Results are kept under a hash of all that shapes them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from build_tools.cache import default_folder
from tests.emulator.translate import translate
from tests.kit import fake_build
from tests.kit.stub import SOURCE as STUB

FOLDER = Path(__file__).resolve().parent
RUNTIME = FOLDER / "runtime"
# What PTX leaves to us is defined: signed integers wrap, and nothing is fused that the module does not fuse.
SEMANTICS = ["-std=c++17", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-shared"]
SEMANTICS += ["-fvisibility=hidden"]
# Optimizing at all brings the stack of a thread from 100 KiB to 10. -g0: with debug information, zig's default, a
# translation takes 100 s instead of 10.
TRANSLATION = [*SEMANTICS, "-O1", "-g0", "-fno-exceptions", "-w"]
DRIVER = [*SEMANTICS, "-O2", "-g0", "-Wall", "-Wextra", "-Werror"]
TRANSLATOR = (
    "ptx_text.py",
    "emit.py",
    "operations.py",
    "memory_ops.py",
    "warp_ops.py",
    "engine_ops.py",
    "translate.py",
)
HEADERS = ("runtime/machine.h", "runtime/narrow.h", "runtime/arithmetic.h")
RENAMED = {
    "cuLibraryLoadData": "stub_load", "cuLibraryGetKernel": "stub_get_kernel", "cuLaunchKernelEx": "stub_launch",
    "cuTensorMapEncodeTiled": "stub_tensor_map", "cuMemsetD32Async": "stub_memset",
}  # fmt: skip


def _native() -> list[str]:
    """Lets the compiler use what this CPU has."""
    return ["-march=native"] if platform.machine() == "x86_64" else []


@functools.cache
def _machine() -> bytes:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine()).encode()


@functools.cache
def _digest(compiler: tuple[str, ...], flags: tuple[str, ...], paths: tuple[Path, ...]) -> bytes:
    """Of the compiler, its flags, the machine and these sources."""
    total = hashlib.sha256(repr((compiler, flags)).encode() + _machine())
    for path in paths:
        total.update(path.name.encode() + path.read_bytes())
    return total.digest()


def make(target: Path, command: list[str]) -> None:
    """Runs a compiler whose output appears at `target` whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        done = subprocess.run([*command, "-o", str(scratch / "out")], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:4])} failed:\n{done.stderr[-4000:]}")
        os.replace(scratch / "out", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def store() -> Path:
    """Where compiled translations are kept, beside the build's kernels."""
    return default_folder() / "emulator"


def driver(compiler: list[str]) -> Path:
    """The emulating libcuda.so.1."""
    sources = [*sorted(RUNTIME.glob("*.cc")), fake_build.ROOT / "host" / "sha256.cc"]
    digest = _digest(tuple(compiler), tuple(DRIVER), (*sources, *sorted(RUNTIME.glob("*.h")), STUB))
    target = store() / f"driver-{digest.hex()[:32]}" / "libcuda.so.1"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        stub = Path(scratch) / "stub.o"
        names = [f"-D{name}={other}" for name, other in RENAMED.items()]
        command = [*fake_build.c_compiler(compiler), "-c", "-fPIC", "-O1", "-fvisibility=hidden", *names, str(STUB)]
        subprocess.run([*command, "-o", str(stub)], check=True)
        flags = [*DRIVER, *_native(), f"-I{fake_build.ROOT / 'host'}", "-Wl,-soname,libcuda.so.1"]
        make(target, [*compiler, *flags, *map(str, sources), str(stub), "-ldl", "-lpthread"])
    return target


def translation(text: str, compiler: list[str]) -> Path:
    """The library of a module's kernels. A change of the translator that leaves its C++ as it was compiles nothing."""
    sources = tuple(FOLDER / name for name in (*TRANSLATOR, *HEADERS))
    name = hashlib.sha256(_digest(tuple(compiler), tuple(TRANSLATION), sources) + text.encode()).hexdigest()
    known = store() / name[:2] / f"{name}.so"
    if known.exists():
        return known
    code = translate(text)
    headers = _digest(tuple(compiler), tuple(TRANSLATION), sources[len(TRANSLATOR) :])
    name = hashlib.sha256(headers + code.encode()).hexdigest()
    target = store() / name[:2] / f"{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "kernels.cc"
            source.write_text(code)
            make(target, [*compiler, *TRANSLATION, *_native(), f"-I{RUNTIME}", str(source)])
    known.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process was faster
        known.symlink_to(target)
    return known


def translate_all(texts: list[str], compiler: list[str], folder: Path) -> None:
    """Fills a folder for EMULATOR_TRANSLATIONS with the translations of these modules."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(dict.fromkeys(text.rstrip("\0") for text in texts))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda text: translation(text, compiler), texts)
        for text, library in zip(texts, made, strict=True):
            link = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
