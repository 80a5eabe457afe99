# SPDX-License-Identifier: Apache-2.0
"""What lanes of a warp, or threads of a block, do together; comparisons; branches."""

from __future__ import annotations

import re

from tests.emulator import memory_ops
from tests.emulator.emit import Writer, vector
from tests.emulator.operations import CXX
from tests.emulator.ptx_text import Instruction, PtxError

SHUFFLES = {"up": "Up", "down": "Down", "bfly": "Xor", "idx": "Index"}
VOTES = {"all": "All", "any": "Any", "uni": "Uniform", "ballot": "Ballot"}
REDUCTIONS = {f"{name}.{kind}": f"{name.title()}{kind.upper()}" for name in ("min", "max") for kind in ("u32", "s32")}
REDUCTIONS |= {"add.u32": "AddU32", "add.s32": "AddU32", "and.b32": "And", "or.b32": "Or", "xor.b32": "Xor"}
ELEMENTS = {"s8": "S8", "u8": "U8", "s4": "S4", "u4": "U4", "f16": "F16", "bf16": "BF16", "e4m3": "E4M3"}
ELEMENTS |= {"e5m2": "E5M2", "s32": "S32", "f32": "F32"}
BITS = {"s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8, "s4": 4, "u4": 4, "f16": 16, "bf16": 16}
SHAPES = {
    4: ("m8n8k32", "m16n8k32", "m16n8k64"), 8: ("m8n8k16", "m16n8k16", "m16n8k32"), 16: ("m16n8k8", "m16n8k16"),
}  # fmt: skip
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def together(w: Writer, insn: Instruction, what: str, mask: str, words: list[str], shape: str = "") -> None:
    """Opens a C++ scope in which x, the kernel's, holds the results."""
    w.lines.append("{ " + " ".join(f"x[{i}] = {word};" for i, word in enumerate(words)))
    if shape:
        w.lines.append(f"static const Shape shape = {shape};")
    pointer = "&shape" if shape else "nullptr"
    w.lines.append(f"t.services->together(t, {w.site(insn)}, Together::k{what}, {mask}, x, {pointer});")


def shuffle(w: Writer, insn: Instruction) -> None:
    word = insn.opcode.split(".")[2]
    to, _, inside = insn.operands[0].partition("|")
    words = [w.read(operand, "b32") for operand in insn.operands[1:4]]
    together(w, insn, f"Shuffle{SHUFFLES[word]}", w.read(insn.operands[4], "b32"), words)
    if inside:
        w.write(inside, "pred", "x[1] != 0")
    w.write(to, "b32", "x[0]")
    w.lines.append("}")


def vote(w: Writer, insn: Instruction) -> None:
    word = insn.opcode.split(".")[2]
    together(w, insn, f"Vote{VOTES[word]}", w.read(insn.operands[2], "b32"), [w.read(insn.operands[1], "pred")])
    w.write(insn.operands[0], *(("b32", "x[0]") if word == "ballot" else ("pred", "x[0] != 0")))
    w.lines.append("}")


def match(w: Writer, insn: Instruction) -> None:
    kind, bits = insn.opcode.split(".")[1], insn.opcode.split(".")[-1]
    to, _, flag = insn.operands[0].partition("|")
    value = f"(uint64_t){w.read(insn.operands[1], bits)}"
    words = [f"(uint32_t)({value})", f"(uint32_t)({value} >> 32)"]
    together(w, insn, f"Match{kind.title()}", w.read(insn.operands[2], "b32"), words)
    w.write(to, "b32", "x[0]")
    if flag:
        w.write(flag, "pred", "x[1] != 0")
    w.lines.append("}")


def reduction(w: Writer, insn: Instruction) -> None:
    name = REDUCTIONS[".".join(insn.opcode.split(".")[2:])]
    together(w, insn, f"Reduce{name}", w.read(insn.operands[2], "b32"), [w.read(insn.operands[1], "b32")])
    w.write(insn.operands[0], "b32", "x[0]")
    w.lines.append("}")


def elect(w: Writer, insn: Instruction) -> None:
    to, _, flag = insn.operands[0].partition("|")
    together(w, insn, "Elect", w.read(insn.operands[1], "b32"), [])
    w.write(to, "b32", "x[0]")
    w.write(flag, "pred", "x[1] != 0")
    w.lines.append("}")


def _matrices(insn: Instruction) -> str:
    words = insn.opcode.split(".")
    count = next((word for word in words if word in ("x1", "x2", "x4")), None)
    if count is None or words[-1] != "b16" or "m8n8" not in words:
        raise PtxError(f"unknown form {insn.opcode}")
    return count[1] + "Transposed" * ("trans" in words)


def load_matrices(w: Writer, insn: Instruction) -> None:
    kind = _matrices(insn)
    address = f"(uint32_t){w.address(insn.operands[1])[1]}"
    together(w, insn, f"Matrices{kind}", "~0u", [address])
    for i, name in enumerate(vector(insn.operands[0])):
        w.write(name, "b32", f"x[{i}]")
    w.lines.append("}")


def store_matrices(w: Writer, insn: Instruction) -> None:
    kind = _matrices(insn)
    words = [f"(uint32_t){w.address(insn.operands[0])[1]}"]
    words += [w.read(name, "b32") for name in vector(insn.operands[1])]
    together(w, insn, f"StoreMatrices{kind}", "~0u", words)
    w.lines.append("}")


def multiply(w: Writer, insn: Instruction) -> None:
    found = re.fullmatch(
        r"mma\.sync\.aligned\.(m(\d+)n8k(\d+))\.row\.col(?:\.kind::f8f6f4)?((?:\.\w+){4})", insn.opcode
    )
    d, a, b, c = found[4][1:].split(".") if found else [""] * 4
    if found is None or c != d or BITS.get(a) != BITS.get(b) or c not in ("s32", "f16", "f32"):
        raise PtxError(f"unknown form {insn.opcode}")
    if found[1] not in SHAPES[BITS[a]] or (c == "s32") != (a[0] in "su"):
        raise PtxError(f"unknown form {insn.opcode}")
    result, *sources = (vector(operand) for operand in insn.operands)
    kinds = ["b32", "b32", "f32" if c == "f32" else "b32"]
    words = []
    for kind, names in zip(kinds, sources, strict=True):
        read = [w.read(name, kind) for name in names]
        words += [f"__builtin_bit_cast(uint32_t, {x})" for x in read] if kind == "f32" else read
    shape = f"{{{found[2]}, 8, {found[3]}, " + ", ".join(f"Element::k{ELEMENTS[x]}" for x in (a, b, c)) + "}"
    together(w, insn, "Multiply", "~0u", words, shape)
    for i, name in enumerate(result):
        w.write(name, "b32", f"x[{i}]")
    w.lines.append("}")


def barrier(w: Writer, insn: Instruction) -> None:
    """bar, barrier: of a warp, of a cluster, of a block."""
    words = [word for word in insn.opcode.split(".")[1:] if word not in ("cta", "aligned")]
    if words[0] == "cluster":
        if words[1] not in ("arrive", "wait"):
            raise PtxError(f"unknown form {insn.opcode}")
        w.lines.append(f"t.services->cluster_{words[1]}(t, {w.site(insn)});")
        return
    if words[0] == "warp":
        together(w, insn, "Sync", w.read(insn.operands[0], "b32"), [])
        w.lines.append("}")
        return
    if words[0] not in ("sync", "arrive", "red"):
        raise PtxError(f"unknown form {insn.opcode}")
    operands = list(insn.operands)
    result = operands.pop(0) if words[0] == "red" else "_"
    predicate = w.read(operands.pop(), "pred") if words[0] == "red" else "false"
    id_, threads = w.read(operands[0], "u32"), w.read(operands[1], "u32") if len(operands) > 1 else "0"
    how = {"and": "And", "or": "Or", "popc": "Count"}[words[1]] if words[0] == "red" else "None"
    waits = "false" if words[0] == "arrive" else "true"
    call = f"t.services->barrier(t, {w.site(insn)}, {id_}, {threads}, {waits}, Reduce::k{how}, {predicate})"
    w.write(result, "u32" if how == "Count" else "pred", call if how in ("Count", "None") else f"{call} != 0")


def compare(w: Writer, insn: Instruction) -> None:
    """setp, and set to all ones."""
    words = insn.opcode.split(".")[1:]
    kind = words.pop()
    target = words.pop() if insn.opcode.startswith("set.") else "pred"
    name = words.pop(0)
    flush = "ftz" in words
    join = next((word for word in words if word in ("and", "or", "xor")), "")
    if set(words) - {"ftz", join}:
        raise PtxError(f"unknown form {insn.opcode}")
    a, b = (w.read(operand, kind) for operand in insn.operands[1:3])
    if kind in ("f16", "bf16"):
        a, b = f"from_{kind}({a})", f"from_{kind}({b})"
    if flush:
        a, b = f"flushed({a})", f"flushed({b})"
    is_float = kind in ("f32", "f64", "f16", "bf16")
    either = f"(({a}) != ({a}) || ({b}) != ({b}))"
    if is_float and name in ("num", "nan"):
        code = either if name == "nan" else f"!{either}"
    elif is_float and name.endswith("u") and name[:-1] in COMPARISONS:
        code = f"({either} || ({a}) {COMPARISONS[name[:-1]]} ({b}))"
    elif is_float and name == "ne":
        code = f"(!{either} && ({a}) != ({b}))"
    elif name in COMPARISONS:
        code = f"(({a}) {COMPARISONS[name]} ({b}))"
    else:
        raise PtxError(f"unknown comparison {name}")
    third = w.read(insn.operands[3], "pred") if join else ""
    sign = {"and": "&", "or": "|", "xor": "^"}.get(join, "")
    to, _, other = insn.operands[0].partition("|")
    if target != "pred":
        w.write(to, target, f"{code} ? ({CXX[target]})~0ull : 0")
        return
    w.lines.append(f"{{ const bool found = {code};")
    joined = f"(found {sign} {third})" if join else "found"
    inverse = f"(!found {sign} {third})" if join else "!found"
    w.lines.append(f"const bool first = {joined}, second = {inverse}; (void)second;")
    w.write(to, "pred", "first")
    if other:
        w.write(other, "pred", "second")
    w.lines.append("}")


def branch(w: Writer, insn: Instruction) -> None:
    if insn.operands[0] not in w.labels:
        raise PtxError(f"unknown label {insn.operands[0]}")
    w.lines.append(f"goto {w.labels[insn.operands[0]]};")


def leave(w: Writer, insn: Instruction) -> None:
    w.lines.append("return;")


def trap(w: Writer, insn: Instruction) -> None:
    w.lines.append(f't.services->fail(t, {w.site(insn)}, "traps", 0);')


def sleep(w: Writer, insn: Instruction) -> None:
    w.lines.append(f"t.services->yield(t, {w.site(insn)});")


def active(w: Writer, insn: Instruction) -> None:
    raise PtxError("activemask: which lanes run together is nobody's promise")


TABLE = memory_ops.TABLE | {
    "shfl": shuffle, "vote": vote, "match": match, "redux": reduction, "elect": elect, "ldmatrix": load_matrices,
    "stmatrix": store_matrices, "mma": multiply, "bar": barrier, "barrier": barrier, "setp": compare, "set": compare,
    "bra": branch, "ret": leave, "exit": leave, "trap": trap, "nanosleep": sleep, "activemask": active,
}  # fmt: skip
