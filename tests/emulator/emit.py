# SPDX-License-Identifier: Apache-2.0
"""Writes operands of PTX instructions as C++ expressions, and assignments to registers as C++ statements."""

from __future__ import annotations

import re
import struct
from collections import ChainMap
from dataclasses import dataclass, field

from tests.emulator.operations import CXX
from tests.emulator.ptx_text import Instruction, PtxError, split

REGISTERS = {"pred": "bool", "f32": "float", "f64": "double"}
REGISTERS |= {f"{kind}{bits}": f"uint{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)}
REGISTERS |= {"f16": "uint16_t", "bf16": "uint16_t", "f16x2": "uint32_t", "bf16x2": "uint32_t"}
_BITS = {"bool": 1, "float": 32, "double": 64} | {f"{u}int{b}_t": b for u in ("", "u") for b in (8, 16, 32, 64)}
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_AXES = {"x": 0, "y": 1, "z": 2}
_SPECIAL = {
    "%laneid": "t.lane", "%warpid": "t.warp", "%smid": "0u", "%nsmid": "1u", "%clock": "(uint32_t)++t.clock",
    "%clock64": "++t.clock", "%globaltimer": "++t.clock", "%lanemask_eq": "(1u << t.lane)",
    "%lanemask_lt": "((1u << t.lane) - 1)", "%lanemask_le": "((2u << t.lane) - 1)",
    "%lanemask_gt": "~((2u << t.lane) - 1)", "%lanemask_ge": "~((1u << t.lane) - 1)",
    "%cluster_ctarank": "t.rank", "%cluster_nctarank": "t.cluster_size", "%cluster_ctaid.x": "t.rank",
    "%cluster_nctaid.x": "t.cluster_size", "%clusterid.x": "(t.ctaid[0] / t.cluster_size)",
    "%nclusterid.x": "(t.nctaid[0] / t.cluster_size)", "%dynamic_smem_size": "t.dynamic_bytes",
}  # fmt: skip
_SPECIAL |= {f"%cluster_{name}.{axis}": value for axis in "yz" for name, value in (("ctaid", "0u"), ("nctaid", "1u"))}
_SPECIAL |= {f"%{name}.{a}": f"t.{name}[{i}]" for name in ("tid", "ntid", "ctaid", "nctaid") for a, i in _AXES.items()}


@dataclass(frozen=True)
class Register:
    """A register under its name in C++."""

    name: str
    cxx: str


@dataclass
class Writer:
    """Where a kernel's C++ grows, and what its names mean at this place."""

    registers: ChainMap[str, Register] = field(default_factory=ChainMap)
    symbols: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: (space, C++ of the address in it)
    labels: ChainMap[str, str] = field(default_factory=ChainMap)
    lines: list[str] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)

    def site(self, insn: Instruction) -> int:
        """Number of an instruction that may fail or wait, for messages."""
        self.sites.append(f"line {insn.line}: {insn.text}")
        return len(self.sites) - 1

    def read(self, operand: str, kind: str) -> str:
        """An operand as a value of the C++ type of a PTX type."""
        wanted = CXX[kind]
        if operand in self.registers:
            register = self.registers[operand]
            return convert(register.name, register.cxx, wanted)
        if operand in _SPECIAL:
            return f"({wanted})({_SPECIAL[operand]})"
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], kind)}"
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return _float_literal(operand, wanted)
        if operand == "WARP_SZ":
            return f"({wanted})32"
        if _INTEGER.fullmatch(operand):
            if wanted == "bool":
                return "true" if int(operand.rstrip("U"), 0) else "false"
            value = int(operand.rstrip("U"), 0) & (1 << _BITS[wanted]) - 1
            if wanted in ("float", "double"):
                return f"__builtin_bit_cast({wanted}, (uint{_BITS[wanted]}_t)0x{value:x}ull)"
            return f"({wanted})0x{value:x}ull"
        name, _, offset = operand.partition("+")
        if name.strip() in self.symbols:
            return f"({wanted})({self.symbols[name.strip()][1]} + {offset.strip() or 0})"
        raise PtxError(f"unknown operand {operand}")

    def write(self, operand: str, kind: str, value: str) -> None:
        """Assigns a value of a PTX type to a register; "_" takes none."""
        if operand == "_":
            self.lines.append(f"(void)({value});")
            return
        if operand not in self.registers:
            raise PtxError(f"unknown register {operand}")
        register = self.registers[operand]
        self.lines.append(f"{register.name} = {convert(f'({CXX[kind]})({value})', CXX[kind], register.cxx)};")

    def address(self, operand: str) -> tuple[str, str]:
        """Of an operand in brackets: the space its symbol lies in, or nothing, and the address as 64 bits."""
        inside = operand.strip()[1:-1].strip()
        found = re.fullmatch(r"([\w$%]+)(?:\s*\+\s*(-?\w+))?", inside)
        if found is None:
            raise PtxError(f"unknown address {operand}")
        base, offset = found[1], found[2] or "0"
        if base in self.symbols:
            space, place = self.symbols[base]
            return space, f"((uint64_t)({place}) + ({offset}))"
        if base in self.registers and self.registers[base].cxx == "uint32_t":
            return "", f"((uint64_t)(uint32_t)({self.registers[base].name} + ({offset})))"
        return "", f"({self.read(base, 'u64')} + ({offset}))"


def _float_literal(text: str, wanted: str) -> str:
    bits, size = int(text[2:], 16), 32 if text[1] in "fF" else 64
    if wanted == "double" and size == 32:
        bits, size = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]))[0], 64
    if wanted == "float" and size == 64:
        bits = struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]))[0]
        size = 32
    return f"__builtin_bit_cast({wanted}, (uint{size}_t)0x{bits:x}ull)"


def convert(value: str, have: str, wanted: str) -> str:
    """A value of one C++ type as another: bits stay, except that signed types extend their sign."""
    if have == wanted:
        return value
    floats = ("float", "double")
    if have not in floats and wanted not in floats:
        return f"({wanted})({value})"
    bits = _BITS[have if have in floats else wanted]
    if have in floats:
        plain = f"__builtin_bit_cast(uint{bits}_t, {value})"
        return plain if wanted == f"uint{bits}_t" else convert(plain, f"uint{bits}_t", wanted)
    return f"__builtin_bit_cast({wanted}, {convert(value, have, f'uint{bits}_t')})"


def vector(operand: str) -> list[str]:
    """The elements of "{a, b}", or the operand alone."""
    return split(operand.strip()[1:-1]) if operand.startswith("{") else [operand]
