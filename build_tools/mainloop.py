# SPDX-License-Identifier: Apache-2.0
"""The main loop of an attention kernel, found in its machine code and counted by what executes it.

The main loop is the innermost loop with tensor-core instructions in it. Every instruction of it counts as executed
once per turn, by every warp; what a turn skips by a forward branch is counted too, so counts are upper bounds.
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
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*)"
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
    """An opcode with its modifiers, the label it may branch to, and the labels in front of it."""

    opcode: str
    target: str | None
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
            target = _TARGET.search(match["operands"])
            branch = target[1] if target and match["opcode"].startswith("BRA") else None
            current.append(Instruction(match["opcode"], branch, tuple(labels)))
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


def multiplications(opcode: str) -> int:
    """M * N * K of a warp's mma.sync: "IMMA.16832.S8.S8" -> 4096. BuildError for other tensor-core instructions."""
    shape = _SHAPE.search(opcode)
    if shape is None:
        raise BuildError(f"{opcode}: no mma.sync shape: the table knows 8x8 and 16x8 tiles")
    return int(shape[1]) * int(shape[2]) * int(shape[3])


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
    """The body of the main loop. BuildError where no loop has tensor-core instructions.

    Of several (masked and unmasked key blocks, say) the one with most kinds of tensor-core instructions counts, and of
    these the one with the fewest other instructions to each.
    """
    place = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    loops = [
        (start, end)
        for end, instruction in enumerate(instructions)
        if instruction.target is not None
        and (start := place.get(instruction.target, end + 1)) <= end
        and any(is_tensor(other) for other in instructions[start : end + 1])
    ]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        raise BuildError("no loop with tensor-core instructions in the machine code")

    def merit(loop: tuple[int, int]) -> tuple[int, float]:
        tensor = [other.opcode for other in instructions[loop[0] : loop[1] + 1] if is_tensor(other)]
        return len(set(tensor)), len(tensor) / (loop[1] + 1 - loop[0])

    start, end = max(inner, key=merit)
    return instructions[start : end + 1]


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
