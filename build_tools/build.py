# SPDX-License-Identifier: Apache-2.0
"""Manifests to bundles and the kernel table: compile what the cache lacks, gate everything, write."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_tools import cache, compile_cuda, compile_triton, cubin, expand, gates, table
from build_tools.bundle import Built, Bundle, write, write_file
from build_tools.errors import BuildError
from build_tools.expand import Kernel, Plan
from build_tools.manifest import load
from build_tools.progress import Progress


def plans(kernels: Path, archs: list[str], rows: list[str], trial: bool = False) -> list[Plan]:
    """The plans of the named architectures and rows; of all if none is named, without those on trial unless asked."""
    manifests = load(kernels)
    known = [manifest.arch.name for manifest in manifests]
    for name in archs:
        if name not in known:
            raise BuildError(f"--arch {name}: there is no such architecture; there are: {', '.join(known)}")
    chosen = [manifest for manifest in manifests if not archs or manifest.arch.name in archs]
    ids = [row.id for manifest in chosen for row in manifest.rows]
    for name in rows:
        if name not in ids:
            raise BuildError(f"--row {name}: there is no such row; there are: {', '.join(ids)}")
    return [plan for manifest in chosen if (plan := expand.expand(manifest, frozenset(rows), trial)).rows or not rows]


def _make(
    kernel: Kernel, kernels: Path, store: cache.Cache, progress: Progress, ptx: bool
) -> tuple[bytes, cubin.Facts]:
    name = cache.key(kernel.job, kernels) + ("-ptx" if ptx else "")
    found = store.get(name)
    cached = found is not None
    if found is None:
        compiler = compile_triton if kernel.job.compiler == "triton" else compile_cuda
        compiled = compiler.compile_job(kernel.job, kernels)
        source = kernels / kernel.job.source.partition(":")[0]
        if cache.current_digest(source, kernels) != cache.source_digest(source, kernels):
            raise BuildError(f"{source} or a file it uses changed while it was being compiled: build again")
        # The driver wants PTX to end with a zero byte.
        found = compiled.ptx.encode() + b"\0" if ptx else compiled.cubin, cubin.inspect(compiled)
        store.put(name, *found)
    progress.advance(f"{kernel.job.arch} {kernel.job.label}", cached)
    return found


def build(
    todo: list[Plan], kernels: Path, store: cache.Cache, jobs: int | None = None, ptx: bool = False
) -> list[Bundle]:
    """Compiles and gates every kernel of the plans. Raises BuildError listing every kernel that failed.

    With `ptx` the bundles hold each kernel's PTX in the place of its machine code, which no gate judges then.
    """
    progress = Progress(sum(len(plan.kernels) for plan in todo))
    failures: list[str] = []
    bundles: list[Bundle] = []
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        futures = [
            [pool.submit(_make, kernel, kernels, store, progress, ptx) for kernel in plan.kernels] for plan in todo
        ]
        try:
            for plan, results in zip(todo, futures, strict=True):
                built: list[Built] = []
                for kernel, result in zip(plan.kernels, results, strict=True):
                    try:
                        data, facts = result.result()
                        if not ptx:
                            gates.check(kernel, facts, plan.manifest.arch.shared_limit)
                        built.append(
                            Built(kernel, expand.file_name(kernel.job, ".ptx" if ptx else ".cubin"), data, facts)
                        )
                    except BuildError as error:
                        failures.append(str(error))
                bundles.append(Bundle(plan, tuple(built)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    progress.finish()
    if failures:
        raise BuildError("\n".join([*failures, f"{len(failures)} kernels failed"]))
    return bundles


def emit(bundles: list[Bundle], out: Path, table_path: Path) -> None:
    """Writes <out>/bundles and the kernel table."""
    write(bundles, out / "bundles")
    write_file(table_path, table.render(bundles).encode())
