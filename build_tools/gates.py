# SPDX-License-Identifier: Apache-2.0
"""Judges compiled kernels: a cubin that is not what its row promises ends the build.

Every message names the row, the kernel, the gate and the figure.
"""

from __future__ import annotations

from build_tools.cubin import Facts
from build_tools.errors import GateError
from build_tools.expand import Kernel

HIDDEN_PARAMS = {"triton": 2, "cuda": 0}  # Triton appends the pointers of its global and profile scratch memory
_PTX_TYPES = {
    "i1": ("u8", "s8", "b8"),
    "i8": ("u8", "s8", "b8"),
    "i16": ("u16", "s16", "b16"),
    "i32": ("u32", "s32", "b32"),
    "i64": ("u64", "s64", "b64"),
    "fp32": ("f32", "b32"),
    "fp64": ("f64", "b64"),
    "tensormap": ("b8[128] align 64",),
}


def check(kernel: Kernel, facts: Facts, shared_limit: int) -> None:
    """Raises GateError listing every gate the kernel fails. `shared_limit`: bytes of shared memory a block may have."""
    problems = [
        *_memory(facts, shared_limit),
        *_registers(kernel, facts),
        *_opcodes(kernel, facts),
        *_dependent_launch(kernel, facts),
        *_params(kernel, facts),
    ]
    if problems:
        rows = ", ".join(kernel.rows)
        where = f"{kernel.job.arch}: row {rows}: kernel {kernel.job.label} ({kernel.job.source})"
        raise GateError("\n".join(f"{where}: {problem}" for problem in problems))


def _memory(facts: Facts, shared_limit: int) -> list[str]:
    problems = []
    if facts.stack or facts.local:
        problems.append(
            f"gate spill: {facts.stack} bytes of stack, {facts.local} of local memory, 0 allowed: "
            "use a smaller tile or more warps"
        )
    if facts.shared + facts.static_shared > shared_limit:
        problems.append(
            f"gate shared: {facts.shared} bytes dynamic + {facts.static_shared} static, the limit is {shared_limit}: "
            "use a smaller tile or fewer stages"
        )
    for name in ("global_scratch", "profile_scratch"):
        if getattr(facts, name):
            problems.append(f"gate scratch: {getattr(facts, name)} bytes of {name.replace('_', ' ')}, 0 allowed")
    return problems


def _registers(kernel: Kernel, facts: Facts) -> list[str]:
    limit = kernel.gates.max_registers
    if limit is None or facts.registers <= limit:
        return []
    return [f"gate registers: {facts.registers} per thread, max_registers is {limit}"]


def _opcodes(kernel: Kernel, facts: Facts) -> list[str]:
    matrix = ", ".join(f"{name} {count}" for name, count in facts.sass.items() if name.endswith("MMA")) or "none"
    problems = [
        f"gate require: no {name} in the machine code (matrix opcodes: {matrix})"
        for name in kernel.gates.require
        if name not in facts.sass
    ]
    problems += [
        f"gate forbid: {facts.sass[name]} {name} in the machine code (matrix opcodes: {matrix})"
        for name in kernel.gates.forbid
        if name in facts.sass
    ]
    return problems


def _dependent_launch(kernel: Kernel, facts: Facts) -> list[str]:
    if not kernel.job.dependent_launch or "ACQBULK" in facts.sass:
        return []
    return ["gate dependent_launch: it may start before what is in front of it ends, and never waits for that"]


def _params(kernel: Kernel, facts: Facts) -> list[str]:
    problems = []
    if facts.symbols != (kernel.job.symbol,):
        problems.append(f"gate symbol: the cubin holds {', '.join(facts.symbols)}, expected {kernel.job.symbol} alone")
    if facts.threads != kernel.job.threads:
        problems.append(f"gate threads: compiled for {facts.threads} per block, the manifest says {kernel.job.threads}")
    if facts.tensor_descriptors:
        problems.append("gate parameters: tensor descriptors are not supported by the launcher")
    hidden = HIDDEN_PARAMS[kernel.job.compiler]
    visible = facts.params[: len(facts.params) - hidden]
    tail = facts.params[len(visible) :]
    if len(visible) != len(kernel.job.args) or any(kind not in ("ptr", "u64", "b64") for kind in tail):
        problems.append(
            f"gate parameters: {len(facts.params)} in the PTX ({', '.join(facts.params)}), the manifest has "
            f"{len(kernel.job.args)} and the compiler adds {hidden} of 64 bits"
        )
        return problems
    for (name, kind), found in zip(kernel.job.args, visible, strict=True):
        fits = found in ("ptr", "u64", "b64") if kind.startswith("*") else found in _PTX_TYPES[kind]
        # NVRTC does not mark pointers, Triton does: there an unmarked u64 is no pointer.
        if fits and kernel.job.compiler == "triton" and (found == "ptr") != kind.startswith("*"):
            fits = False
        if not fits:
            problems.append(f"gate parameters: {name} is {found} in the PTX, the manifest says {kind}")
    return problems
