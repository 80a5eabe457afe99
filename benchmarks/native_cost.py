# SPDX-License-Identifier: Apache-2.0
"""What libsagert itself costs on the host, without Python and without a GPU: calls under a driver that does nothing.

    python benchmarks/native_cost.py [--library build/sagert/lib/libsagert.so] [--capability 90] [--precision int8_fp8]

Compiles benchmarks/native/ with CC, the system's compiler or zig. Prints the least and the median nanoseconds of
sagert_workspace_size, sagert_attention (its launches included, which this driver makes free) and both in turn, and of
sagert_kv_plan and sagert_quantize_kv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PRECISIONS = {"int8_fp16": 1, "int8_fp8": 2, "int8_int8": 3}


def c_compiler() -> list[str]:
    """CC, cc, gcc, clang or zig; SystemExit when there is none."""
    if os.environ.get("CC"):
        return os.environ["CC"].split()
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise SystemExit("no C compiler: set CC or pip install ziglang") from None
    return [sys.executable, "-m", "ziglang", "cc"]


def measure(library: Path, capability: int, precision: str, head_dim: int) -> dict[str, tuple[float, float]]:
    """{call: (least, median) nanoseconds} of one library."""
    compiler = [*c_compiler(), "-O2", "-Wall", "-Wextra"]
    with tempfile.TemporaryDirectory() as folder:
        driver, program = Path(folder) / "libcuda.so.1", Path(folder) / "host_cost"
        sources = HERE / "native"
        subprocess.run([*compiler, "-shared", "-fPIC", sources / "null_driver.c", "-o", driver], check=True)
        subprocess.run(
            [*compiler, f"-I{ROOT}/include", sources / "host_cost.c", "-o", program, library, "-lm"], check=True
        )
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{folder}:{library.parent}",
            "NULL_CAPABILITY": str(capability),
        }
        command = [program, str(PRECISIONS[precision]), str(head_dim)]
        text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in text.splitlines()]
    return {name: (float(least), float(median)) for name, least, median in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=ROOT / "build/sagert/lib/libsagert.so")
    parser.add_argument("--capability", type=int, default=90, help="10 * major + minor")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8_fp8")
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    if not args.library.is_file():
        sys.stderr.write(f"{args.library} is missing: python -m build_tools all builds it\n")
        return 1
    for name, (least, median) in measure(
        args.library.resolve(), args.capability, args.precision, args.head_dim
    ).items():
        sys.stdout.write(f"{name:<16}{least:8.0f} ns least{median:8.0f} ns median\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
