# SPDX-License-Identifier: Apache-2.0
"""What a kernel's main loop costs on GPUs of published rates: clocks per resource, and the bound that follows.

All counts are of one block of BLOCK_ROWS queries and BLOCK_KEYS keys, by whatever warps compute it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from build_tools import mainloop
from build_tools.build import build
from build_tools.cache import Cache
from build_tools.errors import BuildError
from build_tools.expand import Plan
from build_tools.mainloop import Counts
from build_tools.schema import Table, read_toml

BLOCK_ROWS, BLOCK_KEYS = 128, 64
WARP = 32
GPUS = Path(__file__).with_name("gpus.toml")
RESOURCES = ("tensor", "xu", "issue", "alu", "fma", "shared")


@dataclass(frozen=True)
class Gpu:
    """Published rates of a GPU; see gpus.toml."""

    name: str
    archs: tuple[str, ...]  # whose cubins it runs
    source: str
    sms: int
    clock_mhz: int
    lanes: dict[str, int]  # of fma, alu, xu
    issue: int
    shared: int
    tensor: dict[str, int]


@dataclass(frozen=True)
class Entry:
    """A kernel of the table and the counts of its main loop."""

    name: str
    arch: str
    head_dim: int
    causal: bool
    dtype: str
    warp_rows: int  # queries of a warp
    counts: Counts

    @property
    def keys(self) -> float:
        """Keys of one turn of the loop, by the multiplications of Q K^T, which takes whole instructions of channels."""
        found = [op for op in self.counts.tensor if mainloop.is_qk(op)]
        if not found:
            raise BuildError(f"{self.name}: no integer Q K^T in its main loop: {', '.join(self.counts.tensor)}")
        depth = max(mainloop.depth(op) for op in found)
        channels = -(-self.head_dim // depth) * depth
        products = sum(self.counts.tensor[op] * mainloop.multiplications(op) for op in found)
        return products / (self.warp_rows * channels)

    @property
    def turns(self) -> float:
        """Turns of the loop, of one warp each, that compute a block."""
        return BLOCK_KEYS / self.keys * BLOCK_ROWS / self.warp_rows

    def clocks(self, gpu: Gpu) -> dict[str, float]:
        """Clocks of one SM that each resource is busy with a block."""
        counts, turns = self.counts, self.turns
        tensor = 0.0
        for opcode, n in counts.tensor.items():
            kind = mainloop.kind(opcode)
            if kind not in gpu.tensor:
                raise BuildError(f"{self.name}: {opcode} has no rate on {gpu.name}; its rates: {', '.join(gpu.tensor)}")
            tensor += n * mainloop.multiplications(opcode) / gpu.tensor[kind]
        lanes = {name: counts.pipes.get(name, 0) * WARP / rate for name, rate in gpu.lanes.items()}
        shared = (counts.shared_read + counts.shared_written) / gpu.shared
        found = {"tensor": tensor, "issue": counts.issued / gpu.issue, "shared": shared, **lanes}
        return {name: turns * found[name] for name in RESOURCES}

    def bound(self, gpu: Gpu) -> float:
        """TFLOP/s (two products) if the busiest resource were always busy, at the published clock."""
        work = 4.0 * BLOCK_ROWS * BLOCK_KEYS * self.head_dim
        return work / max(self.clocks(gpu).values()) * gpu.sms * gpu.clock_mhz * 1e6 / 1e12

    def to_json(self, gpus: list[Gpu]) -> dict[str, Any]:
        """Counts per block, clocks and bound per GPU; `counts`, of one turn of one warp, is what they follow from."""
        counts, turns = self.counts, self.turns
        return {
            "name": self.name, "arch": self.arch, "head_dim": self.head_dim, "causal": self.causal, "dtype": self.dtype,
            "warp_rows": self.warp_rows, "keys_per_turn": round(self.keys, 3),
            "tensor": {opcode: round(n * turns, 2) for opcode, n in counts.tensor.items()},
            "pipes": {name: round(n * turns, 2) for name, n in counts.pipes.items()},
            "xu": {name: round(n * turns, 2) for name, n in counts.xu.items()},
            "issued": round(counts.issued * turns, 2),
            "shared_read": round(counts.shared_read * turns), "shared_written": round(counts.shared_written * turns),
            "barriers_per_64_keys": round(counts.barriers * BLOCK_KEYS / self.keys, 2),
            "counts": asdict(counts),
            "gpus": {
                gpu.name: {
                    "clocks": {name: round(value, 1) for name, value in self.clocks(gpu).items()},
                    "bound_tflops": round(self.bound(gpu), 1),
                }
                for gpu in gpus if self.arch in gpu.archs
            },
        }  # fmt: skip


def load_gpus(path: Path = GPUS) -> list[Gpu]:
    """The GPUs of a file. Raises ManifestError."""
    root = Table(read_toml(path, path.name), path.name)
    root.take("schema", int)
    found = []
    for data in root.tables("gpu"):
        table = Table(data, f"{path.name}: gpu {data.get('name', '?')!r}")
        name, source = (table.take(key, str) for key in ("name", "source"))
        archs = table.strings("archs")
        sms, clock, issue, shared = (table.at_least(key, 1) for key in ("sms", "clock_mhz", "issue", "shared"))
        lanes = {key: table.at_least(key, 1) for key in ("fma", "alu", "xu")}
        tensor: dict[str, int] = table.take("tensor", dict)
        table.finish()
        found.append(Gpu(name, archs, source, sms, clock, lanes, issue, shared, tensor))
    root.finish()
    return found


def of_rows(plans: list[Plan], kernels: Path, store: Cache, jobs: int | None) -> list[Entry]:
    """An entry for every variant of every row of the plans: one for all dtypes whose main loops count the same."""
    entries: list[Entry] = []
    for plan in plans:
        chosen = sorted({variant.kernels["attention"] for variant in plan.variants})
        some = Plan(plan.manifest, plan.rows, tuple(plan.kernels[i] for i in chosen), ())
        for built in build([some], kernels, store, jobs)[0].kernels:
            job = built.kernel.job
            counts = mainloop.count(mainloop.main_loop(mainloop.disassemble(built.cubin)[job.symbol]))
            rows = built.kernel.tile * WARP // job.threads
            for axes in built.kernel.axes:
                head_dim, causal, dtype = axes["head_dim"], axes["causal"], axes["dtype"]
                entry = Entry(axes["row"], plan.manifest.arch.name, head_dim, causal, dtype, rows, counts)
                entries = _merged(entries, entry)
    return entries


def _merged(entries: list[Entry], entry: Entry) -> list[Entry]:
    """The entries with one more, or with its dtype joined to the one that counts the same."""
    for i, other in enumerate(entries):
        same = (other.name, other.head_dim, other.causal, other.warp_rows, _shape(other)) == (
            entry.name, entry.head_dim, entry.causal, entry.warp_rows, _shape(entry),
        )  # fmt: skip
        if same:
            joined = Entry(**{**vars(other), "dtype": f"{other.dtype}, {entry.dtype}"})
            return [*entries[:i], joined, *entries[i + 1 :]]
    return [*entries, entry]


def _shape(entry: Entry) -> tuple[Any, ...]:
    counts = entry.counts
    tensor = sorted((opcode.removesuffix(".BF16"), n) for opcode, n in counts.tensor.items())
    return (tensor, counts.pipes, counts.shared_read, counts.shared_written, counts.barriers)


def of_file(path: Path, rows: frozenset[str]) -> list[Entry]:
    """Entries of kernels built elsewhere.

    The file is a JSON list of objects with the fields of Entry, but for `counts` a `cubin`, a path beside the file, and
    a `symbol`, a regular expression that finds one of its functions. Or it is what these tools wrote, of which all but
    the entries named in `rows` are taken over.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict):
        kept = [entry for entry in data["entries"] if entry["name"] not in rows]
        names = [field.name for field in fields(Entry)]
        return [
            Entry(**{name: entry[name] for name in names} | {"counts": Counts(**entry["counts"])}) for entry in kept
        ]
    entries = []
    for given in data:
        found = mainloop.disassemble((path.parent / given.pop("cubin")).read_bytes())
        symbol = given.pop("symbol")
        matching = [name for name in found if re.search(symbol, name)]
        if len(matching) != 1:
            raise BuildError(f"{path}: {given['name']}: {symbol!r} finds {len(matching)} functions, expected 1")
        entries.append(Entry(**given, counts=mainloop.count(mainloop.main_loop(found[matching[0]]))))
    return entries


def to_json(entries: list[Entry], gpus: list[Gpu]) -> dict[str, Any]:
    """Everything, and the rates it comes from."""
    return {
        "block": {"queries": BLOCK_ROWS, "keys": BLOCK_KEYS},
        "gpus": [asdict(gpu) for gpu in gpus],
        "entries": [entry.to_json(gpus) for entry in entries],
    }


def markdown(entries: list[Entry], gpus: list[Gpu]) -> str:
    """Two tables: counts of a block, and clocks and bounds on the GPUs that run each entry's architecture."""
    head = ("kernel", "for", "D", "mask", "tensor-core instructions", "XU (of them I2F)", "ALU", "FMA", "all issued",
            "shared read, written", "barriers")  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for entry in entries:
        counts, turns = entry.counts, entry.turns
        tensor = ", ".join(f"{n * turns:.0f} {opcode}" for opcode, n in sorted(counts.tensor.items(), reverse=True))
        xu, i2f = counts.pipes.get("xu", 0) * turns, counts.xu.get("I2F", 0) * turns
        pipes = [f"{counts.pipes.get(name, 0) * turns:.0f}" for name in ("alu", "fma")]
        shared = f"{counts.shared_read * turns / 1024:.0f}, {counts.shared_written * turns / 1024:.0f} KiB"
        barriers = f"{counts.barriers * BLOCK_KEYS / entry.keys:.3g}"
        figures = (f"{xu:.0f} ({i2f:.0f})", *pipes, f"{counts.issued * turns:.0f}", shared, barriers)
        name, *problem = _heading(entry)
        lines.append(_line((name, entry.arch, *problem, tensor, *figures)))
    lines += ["", _line(("GPU", "kernel", "D", "mask", *RESOURCES, "TFLOP/s at most")), _line(["---"] * 11)]
    for gpu in gpus:
        for entry in entries:
            if entry.arch in gpu.archs:
                clocks = entry.clocks(gpu)
                largest = max(clocks.values())
                shown = [f"**{value:.0f}**" if value == largest else f"{value:.0f}" for value in clocks.values()]
                lines.append(_line((gpu.name, *_heading(entry), *shown, f"{entry.bound(gpu):.0f}")))
    return "\n".join(lines) + "\n"


def _heading(entry: Entry) -> tuple[str, str, str]:
    return f"{entry.name} {entry.dtype}", str(entry.head_dim), "causal" if entry.causal else "full"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
