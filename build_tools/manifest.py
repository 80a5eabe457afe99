# SPDX-License-Identifier: Apache-2.0
"""Reads and checks the manifests: kernel templates ([[kernel]]) and architectures ([arch], [[row]]).

What a manifest may say is what this file and ranks.py read; see kernels/portable/manifest.toml and
kernels/sm90/manifest.toml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_tools import ranks
from build_tools.errors import ManifestError
from build_tools.schema import Table, read_toml
from build_tools.vocabulary import ACCURACIES, AXES, DTYPES, FLAGS, LAUNCH, POINTEES, PRECISIONS, ROLES, SCALARS

SCHEMA = 1
_ID = re.compile(r"[a-z0-9][a-z0-9_.]*")


@dataclass(frozen=True)
class Arch:
    """One architecture: what is compiled for and which devices that runs on (capabilities as 10 * major + minor)."""

    name: str
    target: str
    triton_capability: int
    runs_on: tuple[int, int]
    driver_min: int
    shared_limit: int
    ptx: int | None = None  # architecture whose PTX devices of later generations run too: 80 is compute_80


@dataclass(frozen=True)
class Template:
    """A kernel as its source defines it; rows give it constants, types and warps."""

    id: str
    role: str
    compiler: str
    source: str
    args: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    tile: int | str
    where: str

    def names(self) -> set[str]:
        """The options and axes this template reads."""
        found = {value[1:] for _, value in self.constants if isinstance(value, str) and value.startswith("$")}
        if isinstance(self.tile, str):
            found.add(self.tile[1:])
        found |= {option for _, kind in self.args if (option := pointee_option(kind))}
        return found - set(LAUNCH) if self.compiler == "cuda" else found


def pointee_option(kind: str) -> str | None:
    """The option that says what a parameter points to: "qk" of "*qk", "scale" of "*$scale"."""
    if kind in ("*qk", "*pv"):
        return kind[1:]
    return kind[2:] if kind.startswith("*$") else None


@dataclass(frozen=True)
class Gates:
    """What the machine code of a kernel must be: SASS opcodes it must and must not hold, most registers per thread."""

    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    max_registers: int | None = None


@dataclass(frozen=True)
class KernelUse:
    """A row's use of a template. `launch` has LAUNCH; of these and of num_warps each is a number, or a list of
    { <axis> = ..., value = ... }."""

    template: Template
    num_warps: Any
    num_stages: int | None
    num_ctas: int
    max_registers: int | None
    launch: dict[str, Any]
    dependent_launch: bool
    options: dict[str, Any]
    gates: Gates
    where: str


@dataclass(frozen=True)
class Row:
    """One kernel row: what exists, where it runs, what it accepts, how accurate it is."""

    id: str
    family: str
    precision: str
    accuracy: str
    rel_l1_randn: float
    rank: int
    runs_on: tuple[int, int]
    driver_min: int
    head_dim_max: int
    any_head_dim_v: bool  # head_dim_v need not be head_dim
    seqlen_max: int
    flags: tuple[str, ...]
    axes: dict[str, list[Any]]
    quant: dict[str, Any]
    options: dict[str, Any]
    kernels: tuple[KernelUse, ...]
    rank_when: tuple[ranks.RankWhen, ...]
    trial: bool  # built where it is named, for tests; no wheel has it
    where: str


@dataclass(frozen=True)
class Absence:
    """A precision an architecture has no row for, and why."""

    precision: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """An architecture with its rows."""

    arch: Arch
    rows: tuple[Row, ...]
    absences: tuple[Absence, ...]
    templates: dict[str, Template] = field(default_factory=dict)


def load(kernels: Path) -> list[Manifest]:
    """Every architecture of a kernels folder, in order of name. Raises ManifestError."""
    paths = sorted(kernels.glob("*/manifest.toml"))
    if not paths:
        raise ManifestError(f"{kernels}: no */manifest.toml: point --kernels at the folder that holds them")
    roots: list[tuple[Path, Table]] = []
    templates: dict[str, Template] = {}
    for path in paths:
        shown = f"{kernels.name}/{path.parent.name}/manifest.toml"
        root = Table(read_toml(path, shown), shown)
        if root.take("schema", int) != SCHEMA:
            root.fail("schema", f"these tools read schema {SCHEMA}")
        for data in root.tables("kernel"):
            template = _template(data, shown, kernels)
            if template.id in templates:
                raise ManifestError(
                    f"{shown}: kernel {template.id!r}: id already used in {templates[template.id].where}"
                )
            templates[template.id] = template
        roots.append((path, root))
    manifests: list[Manifest] = []
    seen: dict[str, str] = {}
    for path, root in roots:
        if "arch" not in root.keys():  # noqa: SIM118 (a Table is no dict)
            for key in ("row", "absent"):
                if root.tables(key):
                    root.fail(key, "needs an [arch] table in the same file")
            root.finish()
            continue
        arch = _arch(root.table("arch"), path.parent.name)
        rows = tuple(_row(data, arch, templates, root.where) for data in root.tables("row"))
        for row in rows:
            if row.id in seen:
                raise ManifestError(f"{root.where}: row {row.id!r}: id already used in {seen[row.id]}")
            seen[row.id] = root.where
        ranks.check_distinct([(r.where, r.runs_on, {r.rank, *(when.rank for when in r.rank_when)}) for r in rows])
        absences = tuple(_absence(data, root.where, rows) for data in root.tables("absent"))
        root.finish()
        manifests.append(Manifest(arch, rows, absences, templates))
    return sorted(manifests, key=lambda manifest: _natural(manifest.arch.name))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _identifier(table: Table, key: str = "id") -> str:
    value: str = table.take(key, str)
    if not _ID.fullmatch(value):
        table.fail(key, "allowed: lower-case letters, digits, '.' and '_'")
    return value


def _template(data: dict[str, Any], shown: str, kernels: Path) -> Template:
    table = Table(data, f"{shown}: kernel {data.get('id', '?')!r}")
    name = _identifier(table)
    role = table.choice("role", ROLES)
    compiler = table.choice("compiler", ("triton", "cuda"))
    source: str = table.take("source", str)
    suffix = {"triton": ".py", "cuda": ".cu"}[compiler]
    file, _, symbol = source.partition(":")
    if not file.endswith(suffix) or not symbol.isidentifier():
        table.fail("source", f"expected '<file>{suffix}:<function>'")
    if not (kernels / file).is_file():
        table.fail("source", f"there is no {kernels.name}/{file}")
    args = table.take("args", dict)
    for arg, kind in args.items():
        pointee = kind[1:] if isinstance(kind, str) and kind.startswith("*") else None
        if kind == "tensormap" and compiler == "cuda":
            continue
        known = pointee in (*POINTEES, "io", "qk", "pv") or (pointee is not None and re.fullmatch(r"\$\w+", pointee))
        if not known and kind not in SCALARS:
            table.fail("args", f"{arg} has type {kind!r}; allowed: {', '.join(SCALARS)}, tensormap (of CUDA kernels), "
                       f"or * and one of io, qk, pv, $<option>, {', '.join(POINTEES)}")  # fmt: skip
    aligned = table.strings("aligned", [], allowed=args)
    constants = table.take("constants", dict, {})
    for key, value in constants.items():
        if type(value) not in (bool, int, float, str):
            table.fail("constants", f"{key} must be a number, a boolean, a string or '$<option>'")
        if key in args:
            table.fail("constants", f"{key} is a run-time argument too")
    tile = data.get("tile")
    if not (type(tile) is int and tile > 0) and not (isinstance(tile, str) and tile.startswith("$")):
        table.fail("tile", "expected a positive integer or '$<option>'")
    table.take("tile", type(tile))
    table.finish()
    return Template(name, role, compiler, source, tuple(args.items()), aligned, tuple(constants.items()), tile, shown)


def _capabilities(table: Table, default: Any) -> tuple[int, int]:
    if default is not None and "runs_on" not in table.keys():  # noqa: SIM118
        table.take("runs_on", list, [])
        low, high = default
        return low, high
    values = table.take("runs_on", list)
    if len(values) != 2 or not all(isinstance(v, str) and re.fullmatch(r"\d+\.\d", v) for v in values):
        table.fail("runs_on", 'expected the lowest and the highest capability, such as ["9.0", "9.0"]')
    low, high = (int(v.replace(".", "")) for v in values)
    if low > high:
        table.fail("runs_on", "the lowest capability is above the highest")
    return low, high


def _driver(table: Table, default: Any) -> int:
    if default is None:
        return table.at_least("driver_min", 12000)
    return table.at_least("driver_min", 12000, default)


def _arch(table: Table, folder: str) -> Arch:
    name = _identifier(table, "name")
    if name != folder:
        table.fail("name", f"must be the folder's name, {folder!r}")
    target: str = table.take("target", str)
    if not re.fullmatch(r"sm_\d+[af]?", target):
        table.fail("target", "expected sm_<number>, or with 'a' or 'f', such as sm_90a")
    capability = table.at_least("triton_capability", 75)
    runs_on = _capabilities(table, None)
    driver_min, shared_limit = _driver(table, None), table.at_least("shared_limit", 49152)
    arch = Arch(name, target, capability, runs_on, driver_min, shared_limit, table.at_least("ptx", 75, None))
    table.finish()
    return arch


def _axes(table: Table) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for axis in AXES:
        values = table.take(axis, list)
        if not values or len(set(values)) != len(values):
            table.fail(axis, "expected at least one value, none of them twice")
        for value in values:
            if axis == "head_dim" and not (type(value) is int and 0 < value <= 256 and value % 16 == 0):
                table.fail(axis, f"{value!r} is not allowed: multiples of 16 up to 256")
            if axis == "causal" and type(value) is not bool:
                table.fail(axis, f"{value!r} is not allowed: false, true")
            if axis == "dtype" and value not in DTYPES:
                table.fail(axis, f"{value!r} is not allowed: {', '.join(DTYPES)}")
        axes[axis] = values
    table.finish()
    return axes


def _row(data: dict[str, Any], arch: Arch, templates: dict[str, Template], shown: str) -> Row:
    table = Table(data, f"{shown}: row {data.get('id', '?')!r}")
    name = _identifier(table)
    family: str = table.take("family", str)
    trial = table.take("trial", bool, False)
    precision = table.choice("precision", PRECISIONS)
    rank = table.at_least("rank", 0)
    accuracy = table.table("accuracy")
    accuracy_class = accuracy.choice("class", ACCURACIES)
    rel_l1: float = accuracy.take("rel_l1_randn", float)
    accuracy.finish()
    requires = table.table("requires")
    head_dim_max = requires.at_least("head_dim_max", 1)
    any_head_dim_v = requires.choice("head_dim_v", ("equal", "any"), "equal") == "any"
    seqlen_max = requires.at_least("seqlen_max", 1)
    flags = requires.strings("flags", allowed=FLAGS)
    requires.finish()
    axes = _axes(table.table("axes"))
    if head_dim_max > max(axes["head_dim"]):
        requires.fail("head_dim_max", f"no kernel is built for it: axes.head_dim ends at {max(axes['head_dim'])}")
    if ("causal" in flags) != (True in axes["causal"]):
        requires.fail("flags", "'causal' must be listed exactly if axes.causal contains true")
    quant = table.take("quant", dict)
    options = table.take("options", dict, {})
    runs_on = _capabilities(table, arch.runs_on)
    driver_min = _driver(table, arch.driver_min)
    uses = tuple(_use(entry, templates, table.where) for entry in table.tables("kernel"))
    rank_when = tuple(ranks.read(entry, axes, table.where) for entry in table.tables("rank_when"))
    roles = [use.template.role for use in uses]
    if "attention" not in roles or len(set(roles)) != len(roles):
        table.fail(
            "kernel", f"roles used: {roles}; a row needs one 'attention' kernel and at most one of every other role"
        )
    known = set().union(*(use.template.names() for use in uses))
    for option in options:
        if option not in known:
            table.fail("options", f"no kernel of this row reads {option!r}; read: {', '.join(sorted(known))}")
    table.finish()
    return Row(
        name, family, precision, accuracy_class, rel_l1, rank, runs_on, driver_min, head_dim_max, any_head_dim_v,
        seqlen_max, flags, axes, quant, options, uses, rank_when, trial, table.where,
    )  # fmt: skip


def _use(data: dict[str, Any], templates: dict[str, Template], where: str) -> KernelUse:
    table = Table(data, f"{where}: kernel {data.get('use', '?')!r}")
    name: str = table.take("use", str)
    if name not in templates:
        table.fail("use", f"no such kernel template; there are: {', '.join(sorted(templates))}")
    template = templates[name]
    triton = template.compiler == "triton"
    num_warps = _launch_setting(table, data, "num_warps", 1, 32, None) if triton else 0
    for number in [entry["value"] for entry in num_warps] if isinstance(num_warps, list) else [num_warps]:
        if triton and number not in (1, 2, 4, 8, 16, 32):
            table.fail("num_warps", "allowed: 1, 2, 4, 8, 16, 32")
    num_stages = table.at_least("num_stages", 1, None) if triton else None
    num_ctas = table.at_least("num_ctas", 1, 1) if triton else 1
    maxnreg = table.at_least("maxnreg", 24, None)
    launch: dict[str, Any] = {"threads": 0, "shared": 0, "cluster": 1, "ctas_per_sm": 1}
    if not triton:
        limits_of = {"threads": (32, 1024), "shared": (0, 2**31 - 1), "cluster": (1, 16), "ctas_per_sm": (1, 32)}
        defaults = {"shared": 0, "cluster": 1, "ctas_per_sm": 1}
        launch = {key: _launch_setting(table, data, key, *limits_of[key], defaults.get(key)) for key in LAUNCH}
    dependent_launch = not triton and table.take("dependent_launch", bool, False)
    options = table.take("options", dict, {})
    for option in options:
        if option not in template.names():
            read = ", ".join(sorted(template.names())) or "nothing"
            table.fail("options", f"this kernel does not read {option!r}; it reads {read}")
    limits = table.table("gates", {})
    gates = Gates(
        limits.strings("require", []), limits.strings("forbid", []), limits.at_least("max_registers", 1, None)
    )
    for opcode in {*gates.require, *gates.forbid}:
        if not re.fullmatch(r"[A-Z][A-Z0-9]*", opcode):
            raise ManifestError(
                f"{limits.where}: {opcode!r} is no SASS opcode: write its base, such as IMMA or UTCIMMA"
            )
    limits.finish()
    table.finish()
    return KernelUse(
        template, num_warps, num_stages, num_ctas, maxnreg, launch, dependent_launch, options, gates, table.where
    )


def _launch_setting(table: Table, data: dict[str, Any], key: str, low: int, high: int, default: int | None) -> Any:
    """A number, or a list of { <axis> = ..., value = <number> } as options have it."""
    listed = type(data.get(key)) is list
    if listed:
        value: Any = table.take(key, list)
    else:
        value = table.take(key, int) if default is None else table.take(key, int, default)
    for number in [entry.get("value") if type(entry) is dict else None for entry in value] if listed else [value]:
        if type(number) is not int or not low <= number <= high:
            expected = f"an integer from {low} to {high}"
            table.fail(key, f"expected {expected}, or a list of {{ <axis> = <value>, value = <integer> }} of such")
    return value


def _absence(data: dict[str, Any], shown: str, rows: tuple[Row, ...]) -> Absence:
    table = Table(data, f"{shown}: absent {data.get('precision', '?')!r}")
    precision = table.choice("precision", PRECISIONS)
    reason: str = table.take("reason", str)
    table.finish()
    if any(row.precision == precision for row in rows):
        table.fail("precision", "this file has a row of that precision: remove one of the two")
    return Absence(precision, reason)
