# SPDX-License-Identifier: Apache-2.0
"""Writes a PTX module as C++: one function per kernel, which every thread of a block runs on a stack of its own.

Registers are local variables, labels are labels, and instructions are statements (operations.py, memory_ops.py,
warp_ops.py). An instruction that none of them knows is an error here, not at run time.
"""

from __future__ import annotations

import json
from collections import ChainMap

from tests.emulator import engine_ops, memory_ops, operations, warp_ops
from tests.emulator.emit import REGISTERS, Register, Writer
from tests.emulator.ptx_text import SIZES, Entry, Instruction, Label, Module, PtxError, Scope, Variable, parse

ROOM = 160  # words that a lane brings, or gets, at most
SHARED_BEGIN = 1024  # kSharedBegin in runtime/machine.h
# What a register holds before anything is written to it.
_FIRST = {"bool": "false", "float": "__builtin_bit_cast(float, 0xffffffffu)", "double": "0"}


class _Kernel:
    """Translates one kernel."""

    def __init__(self, entry: Entry, module: Module, writer: Writer) -> None:
        self.entry = entry
        self.writer = writer
        self.declared: list[str] = []
        self.scopes = 0
        self.shared = SHARED_BEGIN
        self.dynamic: list[Variable] = []
        for space, variable in module.variables:
            if space == "shared":
                self._place_shared(variable)
        for i, parameter in enumerate(entry.parameters):
            writer.symbols[parameter.name] = ("param", f"(uint64_t)t.parameters[{i}]")

    def _place_shared(self, variable: Variable) -> None:
        if variable.count == 0:
            self.dynamic.append(variable)
            return
        self.shared = -(-self.shared // variable.align) * variable.align
        self.writer.symbols[variable.name] = ("shared", f"((t.rank << kRankShift) + {self.shared}u)")
        self.shared += variable.count * SIZES[variable.kind]

    def _shared_of(self, scope: Scope) -> None:
        for space, variable in scope.variables:
            if space == "shared":
                self._place_shared(variable)
        for item in scope.items:
            if isinstance(item, Scope):
                self._shared_of(item)

    def run(self) -> tuple[str, str]:
        """The function, and the kernel's entry in the table of kernels."""
        self._shared_of(self.entry.body)
        align = max([16, *(variable.align for variable in self.dynamic)])
        start = -(-self.shared // align) * align
        for variable in self.dynamic:
            self.writer.symbols[variable.name] = ("shared", f"((t.rank << kRankShift) + {start}u)")
        self._scope(self.entry.body)
        name = self.entry.name
        sizes = ", ".join(str(p.count * SIZES[p.kind]) for p in self.entry.parameters) or "0"
        # One array for all that lanes exchange: with one for each, optimizing takes gigabytes.
        body = "\n".join([f"uint32_t x[{ROOM}];", *self.declared, *self.writer.lines])
        code = (
            f"static const uint32_t sizes_{name}[] = {{{sizes}}};\nstatic void run_{name}(Thread& t) {{\n{body}\n}}\n"
        )
        row = f'{{"{name}", run_{name}, {self.shared}u, {start}u, {len(self.entry.parameters)}u, sizes_{name}}}'
        return code, row

    def _declare(self, name: str, kind: str) -> Register:
        cxx = REGISTERS[kind]
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        register = Register(f"r{self.scopes}_{plain}", cxx)
        self.declared.append(f"{cxx} {register.name} = {_FIRST.get(cxx, f'({cxx})0xccccccccccccccccull')};")
        return register

    def _scope(self, scope: Scope) -> None:
        w, outer = self.writer, self.writer.registers
        labels = w.labels
        self.scopes += 1
        own: dict[str, Register] = {}
        used = set(_names(scope))
        for prefix, count, kind in scope.ranges:
            for i in range(count):
                if (name := f"{prefix}{i}") in used:
                    own[name] = self._declare(name, kind)
        for name, kind in scope.registers.items():
            own[name] = self._declare(name, kind)
        for space, variable in scope.variables:
            if space == "local":
                size = variable.count * SIZES[variable.kind]
                name = f"local{self.scopes}_{len(w.symbols)}"
                self.declared.append(f"alignas({variable.align}) uint8_t {name}[{size}]; memset({name}, 0xcc, {size});")
                w.symbols[variable.name] = ("local", f"(uint64_t){name}")
            elif space != "shared":
                raise PtxError(f"a .{space} variable in a kernel")
        w.registers = outer.new_child(own)
        names = [item.name for item in scope.items if isinstance(item, Label)]
        w.labels = labels.new_child({name: f"L{self.scopes}_{name.replace('$', '_')}" for name in names})
        for item in scope.items:
            if isinstance(item, Label):
                w.lines.append(f"{w.labels[item.name]}:;")
            elif isinstance(item, Scope):
                self._scope(item)
            else:
                self._instruction(item)
        w.registers, w.labels = outer, labels

    def _instruction(self, insn: Instruction) -> None:
        w = self.writer
        try:
            if insn.guard:
                w.lines.append(f"if ({w.read(insn.guard, 'pred')}) {{")
            self._plain(insn)
            if insn.guard:
                w.lines.append("}")
        except (PtxError, KeyError, ValueError, IndexError) as error:
            raise PtxError(f"{self.entry.name}, line {insn.line}: {insn.text}: {error}") from error

    def _plain(self, insn: Instruction) -> None:
        w, base = self.writer, insn.opcode.partition(".")[0]
        if base == "mov" and memory_ops.move(w, insn):
            return
        if insn.opcode.startswith("cp.async.") and not insn.opcode.startswith(("cp.async.bulk", "cp.async.mbarrier")):
            memory_ops.copy(w, insn)
        elif operation := operations.TABLE.get(insn.opcode):
            values = [w.read(x, kind) for x, kind in zip(insn.operands[1:], operation.operands, strict=True)]
            w.write(insn.operands[0], operation.result, operation.code.format(*(f"({x})" for x in values)))
        elif table := next((t for t in (engine_ops.TABLE, warp_ops.TABLE) if base in t), None):
            table[base](w, insn)
        else:
            raise PtxError(f"instruction {insn.opcode} is not emulated")


def _names(scope: Scope) -> list[str]:
    """Everything the instructions of a scope, and of those inside it, may name."""
    found: list[str] = []
    for item in scope.items:
        if isinstance(item, Scope):
            found += _names(item)
        elif isinstance(item, Instruction):
            text = " ".join([item.guard.lstrip("!"), *item.operands])
            found += "".join(x if x.isalnum() or x in "_$%" else " " for x in text).split()
    return found


def _constant(variable: Variable, number: int) -> tuple[str, str]:
    """The C++ of a module's variable, and of its address."""
    size = SIZES[variable.kind]
    cells = max(variable.count, 1)
    values = []
    for value in variable.values:
        bits = int(value[2:], 16) if value[:2] in ("0f", "0d", "0F", "0D") else int(value.rstrip("U"), 0)
        values.append(f"(uint{8 * size}_t)0x{bits & (1 << 8 * size) - 1:x}ull")
    shown = ", ".join(values) or "0"
    name = f"variable{number}"
    return f"alignas({variable.align}) static uint{8 * size}_t {name}[{cells}] = {{{shown}}};", f"(uint64_t){name}"


def translate(text: str) -> str:
    """The C++ of a module. Raises PtxError that names what is not understood."""
    module = parse(text)
    sites: list[str] = []
    code = ['#include "arithmetic.h"', "using namespace emulator;", "namespace {"]
    symbols: dict[str, tuple[str, str]] = {}
    for i, (space, variable) in enumerate(module.variables):
        if space in ("global", "const"):
            definition, address = _constant(variable, i)
            code.append(definition)
            symbols[variable.name] = (space, address)
    rows = []
    for entry in module.entries:
        writer = Writer(ChainMap(), dict(symbols), ChainMap(), [], sites)
        function, row = _Kernel(entry, module, writer).run()
        code.append(function)
        rows.append(row)
    texts = ", ".join(json.dumps(site) for site in sites) or '""'
    code.append(f"const char* const sites[] = {{{texts}}};")
    code.append(f"const Kernel kernels[] = {{{', '.join(rows)}}};")
    code.append("}")
    code.append(
        'extern "C" __attribute__((visibility("default"))) const Translation emulator_translation = '
        f"{{kernels, {len(rows)}u, sites}};"
    )
    return "\n".join(code) + "\n"
