# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.emulator import compile as compiling
from tests.emulator import package
from tests.emulator.worker import Worker
from tests.kit import fake_build

# Rows that are tested, and head dim, dtype and masks of their variants: each head dim and dtype once, to be quick.
ROWS = {
    "sm80": ["sm80.mma.int8_fp16", "sm80.mma.int8_int8"],
    "sm80 int4": ["sm80.mma.int4_fp16", "sm80.mma.int4_int8"],
    "sm86": ["sm86.mma.int8_fp16", "sm86.mma.int8_int8"],
    "sm89": ["sm89.mma.int8_fp8"],
    "sm120": ["sm120.mma.int8_int8"],
    "sm90": ["sm90.wgmma.int8_fp16", "sm90.wgmma.int8_fp8", "sm90.wgmma.int8_int8"],
    "sm90 causal": ["sm90.wgmma.int8_int8"],
    "sm90 long": ["sm90.wgmma.int8_fp8_long"],
}
CHOSEN = {
    "sm80": {
        (128, "fp16", False), (128, "fp16", True), (64, "bf16", False), (64, "bf16", True), (96, "bf16", False),
        (256, "fp16", True),
    },
    "sm80 int4": {(128, "fp16", False), (64, "bf16", True)},
    "sm86": {(128, "fp16", False), (128, "fp16", True)},
    "sm89": {(128, "fp16", False), (128, "fp16", True)},
    "sm120": {(128, "fp16", False), (128, "fp16", True)},
    "sm90": {(128, "fp16", False), (64, "bf16", True)},
    "sm90 causal": {(128, "bf16", True)},
    "sm90 long": {(64, "fp16", False), (64, "bf16", True)},
}  # fmt: skip


@pytest.fixture(scope="session")
def cxx() -> list[str]:
    """zig's compiler where it is installed: it is quick, and the same everywhere."""
    try:
        import ziglang  # noqa: F401
    except ImportError:
        found = fake_build.find_compiler()
        if found is None:
            pytest.skip("no C++ compiler: set CXX or install ziglang")
        return found
    return [sys.executable, "-m", "ziglang", "c++"]


@pytest.fixture(scope="session")
def emulated(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Translates a module and launches one of its kernels: tests.emulator.device.launch without `folder`."""
    from tests.emulator import device

    folder = tmp_path_factory.mktemp("translations")
    worker = Worker({}, str(compiling.driver(cxx)))

    def run(text: str, name: str, arguments: list, **options: int) -> device.Result:
        compiling.translate_all([text], cxx, folder)
        return worker.run(device.launch, text, name, arguments, folder=str(folder), **options)

    yield run
    worker.close()


class Rows:
    """Packages of rows, and workers that run them."""

    def __init__(self, cxx: list[str], folder: Path) -> None:
        self._cxx, self._folder = cxx, folder
        self._packages: dict[str, package.Package] = {}
        self._workers: dict[tuple[str, int], Worker] = {}

    def run(
        self, arch: str, function: Callable, *arguments: object, multiprocessors: int = 132, **options: object
    ) -> object:
        """Calls function(path of libsagert, ...) where the rows of `arch` run. EMULATOR_ALL builds all variants.

        multiprocessors: of the device; where there are few, a thread block has several tiles.
        """
        if arch not in self._packages:

            def choose(axes: dict) -> bool:
                chosen = (axes["head_dim"], axes["dtype"], axes["causal"]) in CHOSEN[arch]
                return chosen or bool(os.environ.get("EMULATOR_ALL"))

            self._packages[arch] = package.build(arch.split()[0], ROWS[arch], choose, self._cxx, self._folder / arch)
        made = self._packages[arch]
        device = arch, multiprocessors
        if device not in self._workers:
            environment = {name: value for name, value in made.environment().items() if name != "LD_LIBRARY_PATH"}
            environment["STUB_MULTIPROCESSORS"] = str(multiprocessors)
            self._workers[device] = Worker(environment, str(made.driver))
        return self._workers[device].run(function, str(made.library), *arguments, **options)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


@pytest.fixture(scope="session")
def rows(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    made = Rows(cxx, tmp_path_factory.mktemp("rows"))
    yield made
    made.close()
