# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a PTX module into kernels, variables and instructions; knows nothing of what they mean."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """The module holds something that is not understood."""


@dataclass(frozen=True)
class Variable:
    """A .param, .shared, .local, .global or .const variable."""

    name: str
    kind: str  # of its elements: u32, b8, ...
    count: int  # elements
    align: int
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction, its operands as written."""

    line: int
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""  # "p", "!p" or nothing
    text: str = ""


@dataclass(frozen=True)
class Label:
    name: str


@dataclass
class Scope:
    """What stands between braces."""

    registers: dict[str, str] = field(default_factory=dict)  # name: type
    ranges: list[tuple[str, int, str]] = field(default_factory=list)  # prefix, count, type
    variables: list[tuple[str, Variable]] = field(default_factory=list)  # space, variable
    items: list[Instruction | Label | Scope] = field(default_factory=list)


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: list[Variable]
    body: Scope


@dataclass
class Module:
    entries: list[Entry] = field(default_factory=list)
    variables: list[tuple[str, Variable]] = field(default_factory=list)  # space, variable


SIZES = {"pred": 1, "b128": 16} | {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}
SIZES |= {"f16x2": 4, "bf16": 2, "bf16x2": 4}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LABEL = re.compile(r"\s*([\w$%]+):(?!:)")
_VARIABLE = re.compile(
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.ptr\s+\.\w+\s+(?:\.align\s+\d+\s*)?)?\.(?P<kind>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)(?P<array>\[\d*\])?\s*(?:=\s*(?P<values>.+))?$",
    re.DOTALL,
)
_GUARD = re.compile(r"@(!?)([\w$%]+)\s+")
_ENTRY = re.compile(r"\.entry\s+([\w$%]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.DOTALL)


def split(text: str, separator: str = ",") -> list[str]:
    """The parts of a list, whose elements may be lists in braces or brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == separator and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def _variable(text: str, line: int) -> Variable:
    found = _VARIABLE.match(text.strip())
    if found is None or found["kind"] not in SIZES:
        raise PtxError(f"line {line}: unknown declaration: {text.strip()}")
    values = tuple(split(found["values"].strip().strip("{}"))) if found["values"] else ()
    array = (found["array"] or "[1]")[1:-1]
    align = int(found["align"] or SIZES[found["kind"]])
    return Variable(found["name"], found["kind"], int(array or 0), align, values)


class _Body:
    """Takes a kernel's text apart."""

    def __init__(self, text: str, start: int) -> None:
        self._text = text
        self._at = start
        self._ends = [i for i, letter in enumerate(text) if letter == "\n"]

    def _line(self, at: int) -> int:
        return bisect.bisect_left(self._ends, at) + 1

    def _statements(self) -> Iterator[tuple[str, int]]:
        """ "{", "}", "name:" and what ends in a semicolon, with the place of each."""
        while True:
            while self._text[self._at].isspace() or self._text[self._at] == ";":
                self._at += 1
            start = self._at
            if self._text[start] in "{}":
                self._at += 1
                yield self._text[start], start
            elif label := _LABEL.match(self._text, start):
                self._at = label.end()
                yield label[0], start
            else:
                end = self._text.index(";", start)
                self._at = end + 1
                yield " ".join(self._text[start:end].split()), start

    def scope(self) -> tuple[Scope, int]:
        """The scope whose brace was opened just before, and the place behind it."""
        scope = Scope()
        for text, at in self._statements():
            if text == "}":
                return scope, self._at
            if text == "{":
                scope.items.append(self.scope()[0])
            elif text.endswith(":"):
                scope.items.append(Label(text[:-1]))
            elif text.startswith("."):
                self._declare(scope, text, at)
            else:
                scope.items.append(self._instruction(text, at))
        raise PtxError("a scope does not end")

    def _declare(self, scope: Scope, text: str, at: int) -> None:
        word, _, rest = text.partition(" ")
        if word == ".reg":
            kind, _, names = rest.strip().partition(" ")
            for name in split(names):
                if found := re.fullmatch(r"([\w$%]+)<(\d+)>", name):
                    scope.ranges.append((found[1], int(found[2]), kind[1:]))
                else:
                    scope.registers[name] = kind[1:]
        elif word in (".shared", ".local", ".param"):
            scope.variables.append((word[1:], _variable(rest, self._line(at))))
        elif word not in (".pragma", ".loc", ".branchtargets"):
            raise PtxError(f"line {self._line(at)}: unknown directive: {text}")

    def _instruction(self, text: str, at: int) -> Instruction:
        guard, rest = "", text
        if found := _GUARD.match(text):
            guard, rest = found[1] + found[2], text[found.end() :]
        opcode, _, operands = rest.partition(" ")
        return Instruction(self._line(at), opcode, tuple(split(operands)), guard, text)


def parse(text: str) -> Module:
    """A module's kernels and variables. Raises PtxError where its text is not understood."""
    # Comments become as many line ends as they had: messages name lines.
    text = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text.rstrip("\0"))
    module, at = Module(), 0
    pattern = re.compile(r"\s*(?:\.(?:version|target|address_size|file)[^\n]*\n|((?:\.\w+\s+)*?)(\.\w+)\b)")
    while text[at:].strip():
        found = pattern.match(text, at)
        if found is None:
            raise PtxError(f"line {text.count(chr(10), 0, at) + 1}: unknown: {text[at : at + 60].strip()}")
        word = text[found.start() : found.end()].split()[-1] if found[2] else ""
        if not found[2] or word in (".visible", ".weak", ".extern", ".common"):
            at = found.end()
        elif word == ".entry":
            head = _ENTRY.match(text, found.start(2))
            if head is None:
                raise PtxError(f"line {text.count(chr(10), 0, at) + 1}: unknown kernel head")
            line = text.count("\n", 0, at) + 1
            parameters = [_variable(item.removeprefix(".param"), line) for item in split(head[2] or "")]
            body, at = _Body(text, head.end()).scope()
            module.entries.append(Entry(head[1], parameters, body))
        elif word in (".global", ".const", ".shared"):
            end = text.index(";", at)
            module.variables.append((word[1:], _variable(text[found.end() : end], text.count("\n", 0, at) + 1)))
            at = end + 1
        else:
            raise PtxError(f"line {text.count(chr(10), 0, at) + 1}: {word} is not emulated")
    return module
