# SPDX-License-Identifier: Apache-2.0
"""mbarriers, bulk copies and wgmma (compute capability 9.0)."""

from __future__ import annotations

import re

from tests.emulator.emit import Writer, vector
from tests.emulator.ptx_text import Instruction, PtxError
from tests.emulator.warp_ops import ELEMENTS, together

_ORDER = {"release", "relaxed", "acquire", "cta", "cluster", "shared", "shared::cta", "b64"}


def mbarrier(w: Writer, insn: Instruction) -> None:
    words = [word for word in insn.opcode.split(".")[1:] if word not in _ORDER]
    operands, site = insn.operands, w.site(insn)
    if words == ["init"]:
        w.lines.append(
            f"t.services->mbarrier_init(t, {site}, {w.address(operands[0])[1]}, {w.read(operands[1], 'u32')});"
        )
    elif words in (["arrive"], ["arrive", "expect_tx"]) and operands[0] == "_":
        third = w.read(operands[2], "u32") if len(operands) > 2 else ""
        count, expected = ("1", third) if len(words) > 1 else (third or "1", "0")
        w.lines.append(f"t.services->mbarrier_arrive(t, {site}, {w.address(operands[1])[1]}, {count}, {expected});")
    elif words in (["expect_tx"],):
        expected = w.read(operands[1], "u32")
        w.lines.append(f"t.services->mbarrier_arrive(t, {site}, {w.address(operands[0])[1]}, 0, {expected});")
    elif words in (["try_wait", "parity"], ["test_wait", "parity"]):
        waits = "true" if words[0] == "try_wait" else "false"
        parity = w.read(operands[2], "u32")
        call = f"t.services->mbarrier_test(t, {site}, {w.address(operands[1])[1]}, {parity}, {waits})"
        w.write(operands[0], "pred", call)
    elif words in (["inval"],):
        pass
    else:
        raise PtxError(f"unknown form {insn.opcode}")


def copy(w: Writer, insn: Instruction) -> None:
    """cp.async.bulk, and cp.async.mbarrier.arrive."""
    opcode, operands = insn.opcode, insn.operands
    if opcode == "cp.async.mbarrier.arrive.noinc.shared::cta.b64":
        # The copies end, and then the thread arrives: the device may take its time for both.
        w.lines.append("t.services->copy_wait_all(t);")
        w.lines.append(f"t.services->mbarrier_arrive(t, {w.site(insn)}, {w.address(operands[0])[1]}, 1, 0);")
    elif opcode == "cp.async.bulk.commit_group":
        w.lines.append("t.services->bulk_commit(t);")
    elif opcode in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
        w.lines.append(f"t.services->bulk_wait(t, {w.read(operands[0], 'u32')});")
    elif opcode == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
        to, source, barrier = (w.address(operands[i])[1] for i in (0, 1, 3))
        size = w.read(operands[2], "u32")
        w.lines.append(f"t.services->bulk_load(t, {w.site(insn)}, {to}, {source}, {size}, {barrier});")
    elif opcode == "cp.async.bulk.global.shared::cta.bulk_group":
        to, source = (w.address(operands[i])[1] for i in (0, 1))
        w.lines.append(f"t.services->bulk_store(t, {w.site(insn)}, {to}, {source}, {w.read(operands[2], 'u32')});")
    elif opcode == "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes":
        found = re.fullmatch(r"\[\s*([\w$%+]+)\s*,\s*\{(.*)\}\s*\]", operands[1])
        if found is None:
            raise PtxError(f"unknown operand {operands[1]}")
        place = ", ".join(w.read(name, "s32") for name in found[2].replace(" ", "").split(","))
        to, barrier = w.address(operands[0])[1], w.address(operands[2])[1]
        w.lines.append(f"{{ const int32_t place[4] = {{{place}}};")
        source = w.address(f"[{found[1]}]")[1]
        w.lines.append(f"t.services->bulk_tensor(t, {w.site(insn)}, {to}, {source}, place, {barrier}); }}")
    else:
        raise PtxError(f"instruction {opcode} is not emulated")


def group_multiply(w: Writer, insn: Instruction) -> None:
    if not insn.opcode.startswith("wgmma.mma_async"):
        return  # fences and groups: products are there at once
    found = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(s32|f32|f16)\.(\w+)\.(\w+)", insn.opcode)
    if found is None:
        raise PtxError(f"unknown form {insn.opcode}")
    n, k, c, a, b = found.groups()
    names, first, second, counts, *rest = insn.operands
    in_registers = first.startswith("{")
    if any(x != "1" for x in rest[:2]):
        raise PtxError("operands whose sign changes")
    transposed = rest[2:]
    if not in_registers and transposed[:1] not in ([], ["0"]):
        raise PtxError("A transposed")
    across = "true" if transposed and transposed[-1] == "1" else "false"
    words = [w.read(name, "b32") for name in vector(names)]
    if in_registers:
        words += [w.read(name, "b32") for name in vector(first)]
    for operand in [second] if in_registers else [first, second]:
        value = w.read(operand, "u64")
        words += [f"(uint32_t)({value})", f"(uint32_t)({value} >> 32)"]
    words.append(w.read(counts, "pred"))
    kinds = ", ".join(f"Element::k{ELEMENTS[x]}" for x in (a, b, c))
    shape = f"{{16, {n}, {k}, {kinds}, {'false' if in_registers else 'true'}, {across}}}"
    together(w, insn, "GroupMultiply", "~0u", words, shape)
    for i, name in enumerate(vector(names)):
        w.write(name, "b32", f"x[{i}]")
    w.lines.append("}")


TABLE = {"mbarrier": mbarrier, "cp": copy, "wgmma": group_multiply}
