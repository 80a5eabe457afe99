# SPDX-License-Identifier: Apache-2.0
"""Writes bundle folders: the cubins of one architecture and index.json, for people, docs and doctor."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools.cubin import Facts
from build_tools.expand import Kernel, Plan
from build_tools.toolchain import TOOLKIT


@dataclass(frozen=True)
class Built:
    """A compiled kernel that passed its gates."""

    kernel: Kernel
    file: str
    cubin: bytes
    facts: Facts

    @property
    def sha256(self) -> str:
        """Of the cubin, hexadecimal."""
        return hashlib.sha256(self.cubin).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A plan with its compiled kernels, in the plan's order."""

    plan: Plan
    kernels: tuple[Built, ...]


def capability(value: int) -> str:
    """90 -> "9.0"."""
    return f"{value // 10}.{value % 10}"


def index(bundle: Bundle) -> dict[str, Any]:
    """index.json of a bundle."""
    arch = bundle.plan.manifest.arch
    rows = [
        {
            "id": row.id,
            "family": row.family,
            "precision": row.precision,
            "rank": row.rank,
            "rank_when": [when.given for when in row.rank_when],
            "accuracy": {"class": row.accuracy, "rel_l1_randn": row.rel_l1_randn},
            "runs_on": [capability(value) for value in row.runs_on],
            "driver_min": row.driver_min,
            "requires": {"head_dim_max": row.head_dim_max, "seqlen_max": row.seqlen_max, "flags": list(row.flags)},
            "axes": row.axes,
            "quant": row.quant,
        }
        for row in bundle.plan.rows
    ]
    kernels = [
        {
            "file": built.file,
            "symbol": built.kernel.job.symbol,
            "sha256": built.sha256,
            "length": len(built.cubin),
            "role": built.kernel.role,
            "rows": list(built.kernel.rows),
            "axes": list(built.kernel.axes),
            "threads": built.facts.threads,
            "shared": built.facts.shared,
            "registers": built.facts.registers,
            "tile": built.kernel.tile,
            "cluster": built.kernel.job.cluster,
            "ctas_per_sm": built.kernel.job.ctas_per_sm,
            "dependent_launch": built.kernel.job.dependent_launch,
            "signature": " ".join(f"{name}:{kind}" for name, kind in built.kernel.job.args),
            "compiler": built.kernel.job.compiler,
            "sass": built.facts.sass,
        }
        for built in bundle.kernels
    ]
    return {
        "schema": 1,
        "arch": arch.name,
        "target": arch.target,
        "toolkit": TOOLKIT,
        "driver_min": arch.driver_min,
        "runs_on": [capability(value) for value in arch.runs_on],
        "rows": rows,
        "absent": [{"precision": a.precision, "reason": a.reason} for a in bundle.plan.manifest.absences],
        "kernels": kernels,
    }


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; one that already says the same keeps its time stamp."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write(bundles: list[Bundle], folder: Path) -> None:
    """Makes `folder` hold exactly these bundles, one sub-folder each."""
    folder.mkdir(parents=True, exist_ok=True)
    for bundle in bundles:
        home = folder / bundle.plan.manifest.arch.name
        for built in bundle.kernels:
            write_file(home / built.file, built.cubin)
        # The index comes last: a folder whose index names a file has that file.
        write_file(home / "index.json", (json.dumps(index(bundle), indent=1) + "\n").encode())
        wanted = {built.file for built in bundle.kernels} | {"index.json"}
        for path in home.iterdir():
            if path.name not in wanted:
                path.unlink()
    names = {bundle.plan.manifest.arch.name for bundle in bundles}
    for path in folder.iterdir():
        if path.name not in names and path.is_dir():
            shutil.rmtree(path)
