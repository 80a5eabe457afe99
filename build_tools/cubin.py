# SPDX-License-Identifier: Apache-2.0
"""What a cubin is made of, read from its PTX, its resource usage and its disassembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_tools.compile_triton import Compiled
from build_tools.errors import BuildError
from build_tools.toolchain import triton_bin

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(\s+\.ptr)?[^,\n]*?_param_\d+(\[\d+\])?")
_TARGET = re.compile(r"^\.target\s+sm_(\d+)", re.MULTILINE)
_RESERVED = 1024  # shared memory the system takes of every block from capability 9.0 on; SHARED includes it there


@dataclass(frozen=True)
class Facts:
    """What the gates judge and index.json reports. params are PTX types in order; "ptr" is a 64-bit pointer."""

    symbols: tuple[str, ...]
    threads: int
    shared: int  # dynamic
    static_shared: int
    registers: int
    stack: int
    local: int
    global_scratch: int
    profile_scratch: int
    tensor_descriptors: bool
    params: tuple[str, ...]
    sass: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Facts:
        """Inverse of to_json."""
        return Facts(**{**data, "symbols": tuple(data["symbols"]), "params": tuple(data["params"])})


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([str(triton_bin(tool)), *args], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{tool} failed on a cubin: {done.stderr.strip()}")
    return done.stdout + done.stderr


def ptx_params(ptx: str, symbol: str) -> tuple[str, ...]:
    """Types of a kernel's parameters in order: "ptr" for pointers, else PTX's own (u32, b8[128] align 64 ...)."""
    start = re.search(rf"\.entry\s+{re.escape(symbol)}\s*\(", ptx)
    if start is None:
        raise BuildError(f"the PTX has no kernel {symbol}")
    header = ptx[start.end() : ptx.index(")", start.end())]
    return tuple(
        "ptr" if ptr else f"{kind}{array} align {align}" if array else kind
        for align, kind, ptr, array in _PARAM.findall(header)
    )


def opcodes(sass: str) -> dict[str, int]:
    """Counts of opcodes without their modifiers, by name."""
    return dict(sorted(Counter(_INSTRUCTION.findall(sass)).items()))


def inspect(compiled: Compiled) -> Facts:
    """Disassembles a freshly compiled kernel."""
    with tempfile.TemporaryDirectory(prefix="sagert-build-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.cubin)
        usage = _run("cuobjdump", "-res-usage", str(path))
        sass = opcodes(_run("nvdisasm", "-c", "-ndf", str(path)))
    functions = {name: tuple(map(int, figures)) for name, *figures in _USAGE.findall(usage)}
    symbol = compiled.meta["symbol"]
    if symbol not in functions:
        raise BuildError(f"the cubin has no kernel {symbol}; it has: {', '.join(functions) or 'none'}")
    registers, stack, static_shared, local = functions[symbol]
    target = _TARGET.search(compiled.ptx)
    if target is not None and int(target[1]) >= 90:
        static_shared = max(0, static_shared - _RESERVED)
    return Facts(
        tuple(functions), 32 * compiled.meta["num_warps"], compiled.meta["shared"],
        static_shared, registers, stack, local,
        compiled.meta["global_scratch"], compiled.meta["profile_scratch"], compiled.meta["tensor_descriptors"],
        ptx_params(compiled.ptx, symbol), sass,
    )  # fmt: skip
