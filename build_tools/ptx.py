# SPDX-License-Identifier: Apache-2.0
"""A package whose kernels are PTX, for tests: rows of one architecture on a device of a later generation.

The driver compiles PTX of compute_80 for Hopper as well, so the rows for GPUs that are not at hand run there through
the same host code: same kernels' sources, same table, other machine code. Such a package proves results, not speed.
It is never shipped.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from build_tools import cache, table
from build_tools.build import build, plans
from build_tools.bundle import write, write_file
from build_tools.errors import BuildError
from build_tools.expand import Plan
from build_tools.library import build_library


def retarget(plan: Plan, device: int) -> Plan:
    """The plan with kernels compiled for the architecture's `ptx` and rows that serve `device` (90 is 9.0) too."""
    arch = plan.manifest.arch
    if arch.ptx is None:
        raise BuildError(f"--arch {arch.name}: its [arch] names no ptx: its instructions exist on its own devices only")
    if arch.ptx > device:
        raise BuildError(
            f"--arch {arch.name}: PTX of compute_{arch.ptx} does not run on {device / 10}: take a later --on"
        )
    target, runs_on = f"sm_{arch.ptx}", (min(arch.runs_on[0], device), max(arch.runs_on[1], device))
    jobs = [dataclasses.replace(kernel.job, target=target, capability=arch.ptx) for kernel in plan.kernels]
    kernels = tuple(dataclasses.replace(kernel, job=job) for kernel, job in zip(plan.kernels, jobs, strict=True))
    rows = tuple(dataclasses.replace(row, runs_on=runs_on) for row in plan.rows)
    renewed = {row.id: row for row in rows}
    variants = tuple(dataclasses.replace(variant, row=renewed[variant.row.id]) for variant in plan.variants)
    shown = dataclasses.replace(arch, target=f"compute_{arch.ptx}", runs_on=runs_on)
    manifest = dataclasses.replace(plan.manifest, arch=shown, rows=rows)
    return Plan(manifest, rows, kernels, variants)


def make(
    root: Path, kernels: Path, archs: list[str], rows: list[str], device: int, out: Path, store: Path, jobs: int | None
) -> list[Path]:
    """Builds <out>/<arch>/sagert of the clone `root` for every named architecture (of all that can, if none is named).

    Returns:
        The folders to put on PYTHONPATH, one per architecture: their rows would compete in one package.
    """
    chosen = [plan for plan in plans(kernels, archs, rows) if archs or plan.manifest.arch.ptx is not None]
    made = []
    for plan in chosen:
        site = out / plan.manifest.arch.name
        bundles = build([retarget(plan, device)], kernels, cache.Cache(store), jobs, ptx=True)
        package = site / "sagert"
        write(bundles, package / "bundles")
        text = site / "kernel_table.cc"
        write_file(text, table.render(bundles).encode())
        # One folder of objects for all: the host code is compiled once.
        build_library(root, package, text, store, out / "cmake")
        shutil.copytree(
            root / "sagert", package, ignore=shutil.ignore_patterns("__pycache__", "lib", "bundles"), dirs_exist_ok=True
        )
        made.append(site)
    return made
