# SPDX-License-Identifier: Apache-2.0
"""The main loop of an attention kernel, found in its machine code and counted by what executes it.

The main loop is the innermost loop with tensor-core instructions in it, and a turn of it the way through its branches
with most of them, of these the shortest: masks, rescaling of rows that have a new maximum and other things that a turn
can jump over are left out, what it cannot avoid is not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from build_tools.errors import BuildError
from build_tools.toolchain import triton_bin

_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Zx0-9_.]*)(?P<operands>[^;]*)"
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_SHAPE = re.compile(r"\.(16|8)(8)(\d+)(?:\.|$)")

XU = frozenset(("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO"))  # 16 lanes; I2FP is not of them
FMA = frozenset(("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"))
MEMORY = frozenset((
    "LDS", "LDSM", "STS", "STSM", "LDG", "STG", "LDGSTS", "LDGDEPBAR", "SHFL", "ATOM", "ATOMS", "ATOMG", "RED", "LDC",
    "LDL", "STL", "MOVM", "LDCU",
))  # fmt: skip
CONTROL = frozenset((
    "BRA", "BRX", "BAR", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "DEPBAR", "NOP", "WARPSYNC", "YIELD", "SYNCS",
    "ERRBAR", "MEMBAR", "FENCE", "VOTE",
))  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """An opcode with its modifiers, the label it may branch to, whether what follows it is reached, and the labels in
    front of it."""

    opcode: str
    target: str | None
    goes_on: bool
    labels: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Counts:
    """What one warp executes in one turn of a main loop."""

    tensor: dict[str, int]  # by opcode with modifiers
    pipes: dict[str, int]  # xu, fma, alu, memory, control, uniform; with tensor these are all issue slots
    xu: dict[str, int]  # of pipes["xu"], by opcode without modifiers
    shared_read: int  # bytes
    shared_written: int
    barriers: int

    @property
    def issued(self) -> int:
        """All instructions of the turn."""
        return sum(self.tensor.values()) + sum(self.pipes.values())


def functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of every function of a disassembly, by symbol."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    labels: list[str] = []
    for line in sass.splitlines():
        if match := _FUNCTION.match(line):
            current, labels = found.setdefault(match[1], []), []
        elif match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _INSTRUCTION.match(line):
            opcode, operands = match["opcode"], match["operands"]
            target = _TARGET.search(operands) if opcode.startswith("BRA") else None
            leaves = opcode.partition(".")[0] in ("BRA", "BRX", "EXIT", "RET")
            condition = match["predicate"] or (target and operands[: target.start()].strip())
            current.append(Instruction(opcode, target and target[1], bool(condition) or not leaves, tuple(labels)))
            labels = []
    return found


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of every function of a cubin, by symbol."""
    with tempfile.TemporaryDirectory(prefix="sagert-build-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([str(triton_bin("nvdisasm")), "-c", "-ndf", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"nvdisasm failed on a cubin: {done.stderr.strip()}")
    return functions(done.stdout)


def is_tensor(instruction: Instruction) -> bool:
    return instruction.base.endswith("MMA")


def _tile(opcode: str) -> tuple[int, int, int]:
    shape = _SHAPE.search(opcode)
    if shape is None:
        raise BuildError(f"{opcode}: no mma.sync shape: the table knows 8x8 and 16x8 tiles")
    return int(shape[1]), int(shape[2]), int(shape[3])


def multiplications(opcode: str) -> int:
    """M * N * K of a warp's mma.sync: "IMMA.16832.S8.S8" -> 4096. BuildError for other tensor-core instructions."""
    m, n, k = _tile(opcode)
    return m * n * k


def depth(opcode: str) -> int:
    """K of a warp's mma.sync: "IMMA.16832.S8.S8" -> 32. BuildError as of `multiplications`."""
    return _tile(opcode)[2]


def kind(opcode: str) -> str:
    """Name of the tensor-core rate that applies: operands, and of floating point the accumulator: "int8", "f16_f32"."""
    base, *modifiers = opcode.split(".")
    if base == "IMMA":
        return "int4" if {"S4", "U4"} & set(modifiers) else "int8"
    operands = {"HMMA": "f16", "QMMA": "fp8"}.get(base)
    if operands is None:
        raise BuildError(f"{opcode}: its rate is unknown to the table")
    return f"{operands}_{'f16' if modifiers[1] == 'F16' else 'f32'}"


def is_qk(opcode: str) -> bool:
    """Whether it multiplies Q with K: both are signed integers, whereas P has no sign."""
    base, *modifiers = opcode.split(".")
    return base == "IMMA" and not {"U8", "U4"} & set(modifiers)


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """A turn of the main loop. BuildError where no loop has tensor-core instructions.

    Of several (masked and unmasked key blocks, say) the one with most kinds of tensor-core instructions counts, and of
    these the one with the fewest other instructions to each.
    """
    place = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    ends: dict[int, list[int]] = {}  # first instruction of a loop -> the branches back to it
    for i, instruction in enumerate(instructions):
        start = place.get(instruction.target or "", i + 1)
        if start <= i:
            ends.setdefault(start, []).append(i)
    turns = {start: turn for start in ends if (turn := _turn(instructions, place, start, ends[start]))}
    inner = [a for a in turns if not any(a < b and max(ends[b]) <= max(ends[a]) for b in turns)]
    if not inner:
        raise BuildError("no loop with tensor-core instructions in the machine code")

    def merit(start: int) -> tuple[int, float]:
        tensor = [instruction.opcode for instruction in turns[start] if is_tensor(instruction)]
        return len(set(tensor)), len(tensor) / len(turns[start])

    return turns[max(inner, key=merit)]


def _turn(
    instructions: list[Instruction], place: dict[str, int], start: int, ends: list[int]
) -> list[Instruction] | None:
    """The way from `start` to one of `ends` with most tensor-core instructions, and of these the shortest.

    None where no way has any. Ways are sought among forward branches.
    """
    last = max(ends)
    best: list[tuple[int, int] | None] = [None] * (last + 1)  # (tensor-core instructions, -others) on the way from here
    following = [0] * (last + 1)
    for i in range(last, start - 1, -1):
        own = (1, 0) if is_tensor(instructions[i]) else (0, -1)
        if i in ends:
            best[i] = own
        ahead = [i + 1] if instructions[i].goes_on else []
        target = place.get(instructions[i].target or "", 0)
        for after in (*ahead, target) if target > i else ahead:
            rest = best[after] if after <= last else None
            whole = (own[0] + rest[0], own[1] + rest[1]) if rest else None
            if whole and (best[i] is None or whole > (best[i] or whole)):
                best[i], following[i] = whole, after
    found = best[start]
    if found is None or not found[0]:
        return None
    turn = [instructions[start]]
    while following[start]:
        start = following[start]
        turn.append(instructions[start])
    return turn


def _bytes(instruction: Instruction) -> int:
    """Bytes of shared memory a warp's instruction moves, bank conflicts and predicates left aside."""
    modifiers = instruction.opcode.split(".")[1:]
    if instruction.base in ("LDSM", "STSM"):
        return 128 * next((int(m) for m in reversed(modifiers) if m in ("2", "4")), 1)
    return {"128": 512, "64": 256}.get(next((m for m in reversed(modifiers) if m in ("128", "64")), ""), 128)


def _pipe(instruction: Instruction) -> str:
    base = instruction.base
    for name, members in (("xu", XU), ("fma", FMA), ("memory", MEMORY), ("control", CONTROL)):
        if base in members:
            return name
    return "uniform" if base.startswith("U") or base == "R2UR" else "alu"


def count(body: list[Instruction]) -> Counts:
    """Counts of one turn of a loop."""
    others = [instruction for instruction in body if not is_tensor(instruction)]
    return Counts(
        tensor=dict(Counter(instruction.opcode for instruction in body if is_tensor(instruction))),
        pipes=dict(Counter(_pipe(instruction) for instruction in others)),
        xu=dict(Counter(instruction.base for instruction in others if instruction.base in XU)),
        shared_read=sum(_bytes(i) for i in others if i.base in ("LDS", "LDSM")),
        shared_written=sum(_bytes(i) for i in others if i.base in ("STS", "STSM", "LDGSTS")),
        barriers=sum(instruction.base == "BAR" for instruction in others),
    )
