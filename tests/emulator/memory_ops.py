# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, atomics, copies, address conversions, and moves that name addresses or pack registers."""

from __future__ import annotations

from tests.emulator.emit import Writer, vector
from tests.emulator.operations import CXX
from tests.emulator.ptx_text import SIZES, Instruction, PtxError

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param")
# What says how memory is ordered or cached: launches run in order, and so do threads between their waits.
IGNORED = {
    "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "ca", "cg", "cs",
    "cv", "wb", "wt", "lu", "nc", "L1::evict_normal", "L1::evict_last", "L1::evict_first", "L1::no_allocate",
    "L1::evict_unchanged", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last",
    "unified",
}  # fmt: skip
ATOMICS = {
    "add": "old + ({0})", "min": "old < ({0}) ? old : ({0})", "max": "old > ({0}) ? old : ({0})", "and": "old & ({0})",
    "or": "old | ({0})", "xor": "old ^ ({0})", "exch": "{0}", "cas": "old == ({0}) ? ({1}) : old",
    "inc": "old >= ({0}) ? 0 : old + 1", "dec": "old == 0 || old > ({0}) ? ({0}) : old - 1",
}  # fmt: skip


def _place(w: Writer, insn: Instruction, space: str, operand: str, size: int) -> str:
    """C++ of a host pointer to what an address names."""
    found, address = w.address(operand)
    if space == "param" or (not space and found == "param"):
        return f"(uint8_t*)({address})"
    if space in ("local", "const"):
        return f"(uint8_t*)({address})"
    if not space and found == "shared":
        raise PtxError("a variable of shared memory under a generic address")
    kind = {"": "generic", "global": "global"}.get(space, "shared")
    return f"{kind}_at(t, {w.site(insn)}, {address}, {size})"


def _parts(insn: Instruction) -> tuple[str, int, str]:
    """Space, elements and type of a load or a store."""
    space, count, kind = "", 1, ""
    for word in insn.opcode.split(".")[1:]:
        if word in SPACES:
            space = word
        elif word in ("v2", "v4", "v8"):
            count = int(word[1])
        elif word in SIZES:
            kind = word
        elif word not in IGNORED:
            raise PtxError(f"unknown modifier .{word}")
    return space, count, kind


def load(w: Writer, insn: Instruction) -> None:
    space, count, kind = _parts(insn)
    size = SIZES[kind]
    w.lines.append("{")
    w.lines.append(f"const uint8_t* at = {_place(w, insn, space, insn.operands[1], size * count)};")
    names = vector(insn.operands[0])
    for i, name in enumerate(names):
        if name != "_":
            # In between: a register of the address may be one that is loaded.
            w.lines.append(f"{CXX[kind]} x{i} = load<{CXX[kind]}>(at + {i * size});")
    for i, name in enumerate(names):
        if name != "_":
            w.write(name, kind, f"x{i}")
    w.lines.append("}")


def store(w: Writer, insn: Instruction) -> None:
    space, count, kind = _parts(insn)
    size = SIZES[kind]
    w.lines.append("{")
    w.lines.append(f"uint8_t* at = {_place(w, insn, space, insn.operands[0], size * count)};")
    for i, name in enumerate(vector(insn.operands[1])):
        w.lines.append(f"store<{CXX[kind]}>(at + {i * size}, {w.read(name, kind)});")
    w.lines.append("}")


def atomic(w: Writer, insn: Instruction) -> None:
    words = insn.opcode.split(".")
    name = next((word for word in words[1:] if word in ATOMICS), "")
    space = next((word for word in words if word in SPACES), "")
    kind = words[-1]
    unknown = set(words[1:-1]) - {name, space, "noftz", *IGNORED}
    if not name or unknown or kind not in CXX or "x2" in kind:
        raise PtxError(f"unknown form {insn.opcode}")
    operands = insn.operands if words[0] == "atom" else ("_", *insn.operands)
    values = [w.read(operand, kind) for operand in operands[2:]]
    place = _place(w, insn, space, operands[1], SIZES[kind])
    cxx, bits = CXX[kind], f"uint{8 * SIZES[kind]}_t"
    # Floats are compared as bits: a NaN is equal to itself there.
    read, back = (
        ("__builtin_bit_cast(float, bits)", "__builtin_bit_cast(uint32_t, next)") if kind == "f32" else ("bits", "next")
    )
    body = f"{cxx} old = ({cxx}){read}; {cxx} next = {ATOMICS[name].format(*values)}; return ({bits}){back};"
    call = f"change<{bits}>({place}, [&]({bits} bits) {{ {body} }})"
    w.write(operands[0], kind, f"__builtin_bit_cast({cxx}, {call})")


def copy(w: Writer, insn: Instruction) -> None:
    """cp.async to shared memory, and the ends of its groups."""
    words = insn.opcode.split(".")[2:]
    if words == ["commit_group"]:
        w.lines.append("t.services->copy_commit(t);")
    elif words == ["wait_all"]:
        w.lines.append("t.services->copy_wait_all(t);")
    elif words == ["wait_group"]:
        w.lines.append(f"t.services->copy_wait(t, {w.read(insn.operands[0], 'u32')});")
    elif words[0] in ("ca", "cg") and not set(words[1:]) - {"shared", "shared::cta", "global", *IGNORED}:
        operands = list(insn.operands)
        if "L2::cache_hint" in words:
            operands.pop()
        size = operands[2]
        source = w.read(operands[3], "u32") if len(operands) > 3 else size
        to, origin = w.address(operands[0])[1], w.address(operands[1])[1]
        w.lines.append(f"t.services->copy(t, {w.site(insn)}, {to}, {origin}, {size}, {source});")
    else:
        raise PtxError(f"unknown form {insn.opcode}")


def convert_address(w: Writer, insn: Instruction) -> None:
    """cvta: shared memory has a window in the generic addresses; the other spaces' addresses are generic ones."""
    words = insn.opcode.split(".")[1:]
    value = w.read(insn.operands[1], words[-1])
    if words[0] == "to":
        code = f"{value} - kSharedWindow" if words[1].startswith("shared") else value
    else:
        code = f"{value} + kSharedWindow" if words[0].startswith("shared") else value
    w.write(insn.operands[0], words[-1], code)


def is_space(w: Writer, insn: Instruction) -> None:
    inside = f"{w.read(insn.operands[1], 'u64')} >= kSharedWindow"
    word = insn.opcode.split(".")[1]
    if word not in ("shared", "shared::cta", "shared::cluster", "global"):
        raise PtxError(f"unknown form {insn.opcode}")
    w.write(insn.operands[0], "pred", inside if word.startswith("shared") else f"!({inside})")


def move(w: Writer, insn: Instruction) -> bool:
    """mov between a register and its parts; False where it is a plain one."""
    kind = insn.opcode.split(".")[1]
    to, source = insn.operands
    if to.startswith("{"):
        names = vector(to)
        part = f"b{8 * SIZES[kind] // len(names)}"
        w.lines.append(f"{{ const {CXX[kind]} whole = {w.read(source, kind)};")
        for i, name in enumerate(names):
            if name != "_":
                w.write(name, part, f"whole >> {i * 8 * SIZES[part]}")
        w.lines.append("}")
    elif source.startswith("{"):
        names = vector(source)
        part = f"b{8 * SIZES[kind] // len(names)}"
        pieces = [f"(({CXX[kind]}){w.read(name, part)} << {i * 8 * SIZES[part]})" for i, name in enumerate(names)]
        w.write(to, kind, " | ".join(pieces))
    else:
        return False
    return True


def map_shared(w: Writer, insn: Instruction) -> None:
    kind = insn.opcode.split(".")[-1]
    address, rank = w.read(insn.operands[1], kind), w.read(insn.operands[2], "u32")
    mask = "((1ull << kRankShift) - 1)"
    if "shared::cluster" in insn.opcode:
        w.write(insn.operands[0], kind, f"({address} & {mask}) | ({CXX[kind]}){rank} << kRankShift")
    else:
        w.write(insn.operands[0], kind, f"({address} & (kSharedWindow | {mask})) | (uint64_t){rank} << kRankShift")


def nothing(w: Writer, insn: Instruction) -> None:
    """Fences, prefetches, hints: threads see each other's writes at once, and launches run in order."""


TABLE = {
    "ld": load, "ldu": load, "st": store, "atom": atomic, "red": atomic, "cvta": convert_address, "isspacep": is_space,
    "mapa": map_shared, "membar": nothing, "fence": nothing, "prefetch": nothing, "prefetchu": nothing,
    "griddepcontrol": nothing, "setmaxnreg": nothing, "discard": nothing, "applypriority": nothing, "pmevent": nothing,
}  # fmt: skip
