# SPDX-License-Identifier: Apache-2.0
"""Expands rows over their axes into variants, and variants into jobs: what the compilers are asked for.

A job holds resolved values only, so kernels that come out the same for several rows or variants are one job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from build_tools.errors import ManifestError
from build_tools.manifest import Gates, KernelUse, Manifest, Row, Template, pointee_option
from build_tools.vocabulary import AXES, LAUNCH, POINTEES


@dataclass(frozen=True)
class Job:
    """One kernel to compile and how it is launched. `label` names it among all of its architecture, and its file."""

    arch: str
    target: str
    capability: int
    compiler: str
    source: str
    args: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int | None
    num_ctas: int
    max_registers: int | None
    threads: int
    shared: int
    symbol: str
    label: str
    cluster: int = 1
    ctas_per_sm: int = 1
    dependent_launch: bool = False

    def digest(self) -> str:
        """Names the job: equal for equal jobs only."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Kernel:
    """A job with what is asked of its result, by the rows that use it."""

    job: Job
    role: str
    tile: int
    gates: Gates
    rows: tuple[str, ...]
    axes: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Variant:
    """One point of a row's axes; kernels maps a role to an index into the plan's kernels."""

    row: Row
    axes: dict[str, Any]
    kernels: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Everything one architecture needs."""

    manifest: Manifest
    rows: tuple[Row, ...]
    kernels: tuple[Kernel, ...]
    variants: tuple[Variant, ...]


@dataclass
class _Draft:
    job: Job
    role: str
    tile: int
    gates: Gates
    rows: list[str] = field(default_factory=list)
    axes: list[dict[str, Any]] = field(default_factory=list)


def resolve(value: Any, axes: dict[str, Any], where: str) -> Any:
    """An option's value at one point of the axes: itself, or the first entry of a list of tables that fits."""
    if not isinstance(value, list):
        return value
    for entry in value:
        if not isinstance(entry, dict) or "value" not in entry:
            raise ManifestError(f"{where}: {entry!r}: expected {{ <axis> = <value>, value = <value> }}")
        for axis in entry:
            if axis not in (*AXES, "value"):
                raise ManifestError(f"{where}: {axis!r} is no axis; allowed: {', '.join(AXES)}, value")
        if all(axes[axis] == wanted for axis, wanted in entry.items() if axis != "value"):
            return entry["value"]
    raise ManifestError(f"{where}: no entry fits {axes}: add one, or a last entry with value alone")


def expand(manifest: Manifest, row_ids: frozenset[str] = frozenset(), trial: bool = False) -> Plan:
    """The plan of one architecture, of the rows that wheels have (`trial`: of all) or of the named ones only."""
    rows = tuple(row for row in manifest.rows if (row.id in row_ids if row_ids else trial or not row.trial))
    drafts: dict[str, _Draft] = {}  # by digest: as dictionary keys, 1 and True would be one job
    points: list[tuple[Row, dict[str, Any], dict[str, str]]] = []
    for row in rows:
        for values in itertools.product(*(row.axes[axis] for axis in AXES)):
            axes = dict(zip(AXES, values, strict=True))
            jobs: dict[str, str] = {}
            for use in row.kernels:
                job, tile = _job(manifest, row, use, axes)
                draft = drafts.setdefault(job.digest(), _Draft(job, use.template.role, tile, use.gates))
                draft.gates = _merge(draft.gates, use.gates)
                if row.id not in draft.rows:
                    draft.rows.append(row.id)
                draft.axes.append({"row": row.id, **axes})
                jobs[use.template.role] = job.digest()
            points.append((row, axes, jobs))
    index = {digest: i for i, digest in enumerate(drafts)}
    named = _distinct_labels([draft.job for draft in drafts.values()])
    kernels = tuple(
        Kernel(named[i], d.role, d.tile, d.gates, tuple(d.rows), tuple(d.axes)) for i, d in enumerate(drafts.values())
    )
    variants = tuple(
        Variant(row, axes, {role: index[digest] for role, digest in jobs.items()}) for row, axes, jobs in points
    )
    return Plan(manifest, rows, kernels, variants)


def _merge(a: Gates, b: Gates) -> Gates:
    limits = [limit for limit in (a.max_registers, b.max_registers) if limit is not None]
    return Gates(
        tuple(dict.fromkeys((*a.require, *b.require))),
        tuple(dict.fromkeys((*a.forbid, *b.forbid))),
        min(limits) if limits else None,
    )


def _lookup(name: str, row: Row, use: KernelUse, axes: dict[str, Any]) -> Any:
    if name in axes:
        return axes[name]
    if name in LAUNCH and use.template.compiler == "cuda":
        return resolve(use.launch[name], axes, f"{use.where}: {name}")
    for options, where in ((use.options, use.where), (row.options, row.where)):
        if name in options:
            return resolve(options[name], axes, f"{where}: options: {name}")
    known = sorted({*axes, *use.options, *row.options})
    raise ManifestError(f"{use.where}: '${name}' has no value: add {name} to options (known here: {', '.join(known)})")


def _job(manifest: Manifest, row: Row, use: KernelUse, axes: dict[str, Any]) -> tuple[Job, int]:
    template, arch = use.template, manifest.arch

    def value(given: Any) -> Any:
        return _lookup(given[1:], row, use, axes) if isinstance(given, str) and given.startswith("$") else given

    def kind(name: str, given: str) -> str:
        if not given.startswith("*"):
            return given
        option = pointee_option(given)
        pointee = _lookup(option, row, use, axes) if option else given[1:]
        if pointee not in (*POINTEES, "io"):
            raise ManifestError(f"{use.where}: {name} points to {pointee!r}; allowed: io, {', '.join(POINTEES)}")
        return f"*{axes['dtype'] if pointee == 'io' else pointee}"

    args = tuple((name, kind(name, given)) for name, given in template.args)
    constants = tuple((name, value(given)) for name, given in template.constants)
    tile = value(template.tile)
    if type(tile) is not int or tile <= 0:
        raise ManifestError(f"{use.where}: tile = {tile!r}: expected a positive integer")
    launch = {key: resolve(use.launch[key], axes, f"{use.where}: {key}") for key in LAUNCH}
    num_warps = resolve(use.num_warps, axes, f"{use.where}: num_warps")
    if template.compiler == "triton":
        launch["threads"] = 32 * num_warps
    label = _label(template, arch.name, row.family, args, constants, num_warps, launch["threads"])
    function = template.source.partition(":")[2]
    job = Job(
        arch.name, arch.target, arch.triton_capability, template.compiler, template.source, args, template.aligned,
        constants, num_warps, use.num_stages, use.num_ctas, use.max_registers, launch["threads"], launch["shared"],
        label if template.compiler == "triton" else function,  # of CUDA the source's own extern "C" name
        label, launch["cluster"], launch["ctas_per_sm"], use.dependent_launch,
    )  # fmt: skip
    return job, tile


def _label(
    template: Template,
    arch: str,
    family: str,
    args: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    num_warps: int,
    threads: int,
) -> str:
    """A readable name made of what distinguishes the kernel: types, constants, warps or threads."""
    cuda = template.compiler == "cuda"
    function = template.source.partition(":")[2]
    open_kinds = [i for i, (_, given) in enumerate(template.args) if given == "*io" or pointee_option(given)]
    kinds = [args[i][1][1:] for i in open_kinds]
    parts = [arch, *([family] if cuda else []), function, *dict.fromkeys(kinds)]
    for name, value in constants:
        if value is True:
            parts.append(name.lower())
        elif value is not False:
            parts.append(f"{name.lower()}{value}")
    parts.append(f"t{threads}" if cuda else f"w{num_warps}")
    return "sagert_" + "_".join("".join(c if c.isalnum() else "_" for c in part) for part in parts)


def _distinct_labels(jobs: list[Job]) -> list[Job]:
    """Jobs that would share a label get a suffix; a Triton kernel's symbol is its label."""
    labels = [job.label for job in jobs]
    named = []
    for job in jobs:
        if labels.count(job.label) > 1:
            label = f"{job.label}_{job.digest()[:8]}"
            job = dataclasses.replace(job, label=label, symbol=label if job.compiler == "triton" else job.symbol)
        named.append(job)
    return named


def file_name(job: Job, suffix: str = ".cubin") -> str:
    """The kernel's file name inside its bundle."""
    return f"{job.label}{suffix}"
