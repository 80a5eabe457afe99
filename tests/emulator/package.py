# SPDX-License-Identifier: Apache-2.0
"""A libsagert whose bundles hold PTX of chosen variants of rows, and the translations of that PTX.

Unlike `build_tools ptx` it assembles nothing: no ptxas, no gates, and only the variants that tests ask for.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import cache, compile_cuda, table
from build_tools.build import plans
from build_tools.bundle import Built, Bundle, write, write_file
from build_tools.cubin import Facts
from build_tools.expand import Kernel, Plan, file_name
from build_tools.ptx import retarget
from tests.emulator import compile as compiling
from tests.kit import fake_build

KERNELS = fake_build.ROOT / "kernels"
Chooser = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Package:
    """What a process needs to run rows without a GPU."""

    library: Path
    driver: Path
    translations: Path
    capability: int

    def environment(self) -> dict[str, str]:
        """Variables of a process whose driver is the emulating one."""
        return {
            "LD_LIBRARY_PATH": str(self.driver.parent), "EMULATOR_TRANSLATIONS": str(self.translations),
            "STUB_CAPABILITY": str(self.capability),
        }  # fmt: skip


def _chosen(plan: Plan, choose: Chooser, target: str) -> Plan:
    """The plan with the variants whose axes are chosen, and their kernels, compiled for `target` to PTX only."""
    variants = [variant for variant in plan.variants if choose(variant.axes)]
    used = sorted({index for variant in variants for index in variant.kernels.values()})
    jobs = [dataclasses.replace(plan.kernels[index].job, target=target) for index in used]
    kernels = tuple(dataclasses.replace(plan.kernels[i], job=job) for i, job in zip(used, jobs, strict=True))
    places = {old: new for new, old in enumerate(used)}
    moved = [
        dataclasses.replace(variant, kernels={role: places[i] for role, i in variant.kernels.items()})
        for variant in variants
    ]
    return Plan(plan.manifest, plan.rows, kernels, tuple(moved))


def ptx_of(kernel: Kernel) -> str:
    """The kernel's PTX, kept from run to run."""
    path = compiling.store() / "ptx" / f"{cache.key(kernel.job, KERNELS)}.ptx"
    if not path.exists():
        write_file(path, compile_cuda.compile_job(kernel.job, KERNELS).ptx.encode())
    return path.read_text()


def _built(kernel: Kernel) -> Built:
    job = kernel.job
    facts = Facts((job.symbol,), job.threads, job.shared, 0, 0, 0, 0, 0, 0, False, (), {})
    return Built(kernel, file_name(job, ".ptx"), ptx_of(kernel).encode() + b"\0", facts)


def _library(bundle: Bundle, compiler: list[str]) -> Path:
    """libsagert with this bundle."""
    text = table.render([bundle])
    total = hashlib.sha256(
        repr(compiler).encode() + text.encode() + (fake_build.ROOT / "include/sagert.h").read_bytes()
    )
    for path in sorted((fake_build.ROOT / "host").rglob("*.[ch]*")):
        total.update(path.name.encode() + path.read_bytes())
    home = compiling.store() / f"package-{total.hexdigest()[:32]}"
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=home.parent))
        try:
            write([bundle], work / "bundles")
            write_file(work / "kernel_table.cc", text.encode())
            sources = [work / "kernel_table.cc", *sorted((fake_build.ROOT / "host").rglob("*.cc"))]
            flags = ["-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", '-DSAGERT_VERSION="0.1.0"']
            flags += ["-DSAGERT_BUILD", *(f"-I{fake_build.ROOT / name}" for name in ("include", "host", "."))]
            command = [*compiler, *flags, *map(str, sources), "-ldl", "-lpthread"]
            compiling.make(work / "lib" / "libsagert.so", command)
            os.rename(work, home)
        except OSError:
            if not home.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return home / "lib" / "libsagert.so"


def build(arch: str, rows: list[str], choose: Chooser, compiler: list[str], folder: Path, device: int = 0) -> Package:
    """Rows of an architecture, in the variants that `choose` takes, on an emulated device of capability `device`."""
    (plan,) = plans(KERNELS, [arch], rows)
    capability = device or plan.manifest.arch.runs_on[0]
    if plan.manifest.arch.ptx is not None:
        plan = retarget(plan, capability)
    target = plan.manifest.arch.target.replace("sm_", "compute_")
    plan = _chosen(plan, choose, target)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        bundle = Bundle(plan, tuple(pool.map(_built, plan.kernels)))
        driver = pool.submit(compiling.driver, compiler)
        library = pool.submit(_library, bundle, compiler)
        compiling.translate_all([built.cubin.decode() for built in bundle.kernels], compiler, folder)
        return Package(library.result(), driver.result(), folder, capability)
