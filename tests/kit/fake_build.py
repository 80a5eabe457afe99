# SPDX-License-Identifier: Apache-2.0
"""Builds libsagert around invented rows and cubins, so that its tests need neither a GPU nor compiled kernels.

The kernels' parameter lists are the real ones. The rows are invented to hold what real ones may come to hold:
several architectures, a row of low accuracy, a row that needs a newer driver, ranks that depend on the shape, an
absence. What the wgmma family passes is written down here a second time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.kit import abi

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp16": abi.FP16, "bf16": abi.BF16}
ROLES = (
    "kv_stats", "quantize_kv", "quantize_q", "attention", "combine", "scan_mask", "list_blocks", "repair",
    "attention_lse",
)  # fmt: skip
PLAIN_KERNELS = ("kv_stats", "quantize_kv", "quantize_q", "attention")  # ids after "portable."
MMA_KERNELS = ("kv_stats", "quantize_kv", "attention")  # ids after "mma."
GENERAL_KERNELS = ("kv_stats", "quantize_kv", "quantize_q", "scan_mask", "list_blocks", "general", "repair")
GENERAL_FLAGS = abi.MASK | abi.VARLEN | abi.WINDOW | abi.BOTTOM_RIGHT
FLAGS = abi.CAUSAL | abi.LSE | abi.NO_SMOOTH_K | abi.QUANTIZED_KV
ANY = (0, 2**63 - 1)


def _strides(tensor: str) -> str:
    return " ".join(f"{tensor}_s{axis}:i64" for axis in "bhsd")


# By role; "*io" and "*pv" as in manifests, "V8" of attention gives way to "VMap" where V stays in 16 bits.
WGMMA_ARGS = {
    "quantize_kv": f"""
        K:*io V:*io K8:*i8 KScale:*fp32 KBad:*i32 KShift:*fp32 KNorm:*fp32 V8:*pv VScale:*scale VMean:*fp32 VFirst:*i32
        HeadFlags:*i32 seqlen_k:i32 blocks:i32 heads_kv:i32 head_dim:i32 head_dim_v:i32
        smooth_k:i32 v_jobs:i32 copy_v:i32 v_stats:i32 {_strides("k")} {_strides("v")} k_vec:i32 v_vec:i32 NextTile:*i32
    """.split(),
    "attention": f"""
        Q:*io K8:*i8 KScale:*fp32 KBad:*i32 KShift:*fp32 KNorm:*fp32 V8:*pv VScale:*scale VMean:*fp32 VFirst:*i32
        HeadFlags:*i32 Out:*io Lse:*fp32 scale_log2:fp32 seqlen_q:i32 seqlen_k:i32 blocks:i32 heads_q:i32 group:i32
        head_dim:i32 head_dim_v:i32 tiles:i32 heads_total:i32 section:i32 {_strides("q")} {_strides("o")}
        q_vec:i32 o_vec:i32 write_lse:i32 PartOut:*fp32 PartLse:*fp32 NextTile:*i32
    """.split(),
    "combine": f"""
        PartOut:*fp32 PartLse:*fp32 Out:*io Lse:*fp32 seqlen_q:i32 heads_q:i32 heads_total:i32 head_dim_v:i32 parts:i32
        {_strides("o")} o_vec:i32 write_lse:i32
    """.split(),
}
COMBINE_TILE = 8


@dataclass(frozen=True)
class RankWhen:
    """One entry of a row's rank table."""

    rank: int
    causal: int = -1
    head_dim: tuple[int, int] = ANY
    seqlen_q: tuple[int, int] = ANY
    seqlen_k: tuple[int, int] = ANY
    tiles_max: int = ANY[1]


@dataclass(frozen=True)
class FakeRow:
    """One row of the invented table."""

    arch: str
    precision: int
    name: str
    rank: int
    accuracy: int
    low: int
    high: int
    driver_min: int = 12000
    shared: int = 100000
    family: str = "portable"
    cluster: int = 1  # of quantize_kv
    ctas_per_sm: int = 1
    general: bool = False  # of the portable family: masks, windows, packed sequences, head dims up to 256
    combine: bool = False  # the keys of small grids can be split
    k8: str = "i8"  # type of quantized K, of the mma family
    pv: str = ""  # type of V as attention reads it, where the precision does not say
    head_dims: tuple[int, ...] = (64, 128)
    rank_when: tuple[RankWhen, ...] = ()


ROWS = (
    FakeRow("sm80", abi.INT8_FP16, "int8_fp16", 100, 0, 80, 87),
    FakeRow("sm89", abi.INT8_FP16, "int8_fp16", 100, 0, 89, 89),
    FakeRow("sm89", abi.INT8_FP8, "int8_fp8", 90, 1, 89, 89, shared=40000),
    FakeRow("sm90", abi.INT8_FP16, "int8_fp16", 100, 0, 90, 90),
    FakeRow("sm90", abi.INT8_FP8, "int8_fp8", 90, 1, 90, 90),
    FakeRow("sm90", abi.INT4_FP8, "int4_fp8", 10, 2, 90, 90),
    FakeRow("sm90", abi.INT8_FP8, "int8_fp8_cu13", 80, 1, 90, 90, driver_min=13000),
    FakeRow("sm120", abi.INT8_FP16, "int8_fp16", 100, 0, 120, 121, driver_min=12080),
    FakeRow("sm100", abi.INT8_FP16, "int8_fp16", 100, 0, 100, 100, family="wgmma", cluster=8, combine=True),
    FakeRow("sm100", abi.INT8_FP8, "int8_fp8", 90, 1, 100, 100, family="wgmma", cluster=4, combine=True),
    FakeRow(
        "sm100", abi.INT8_INT8, "int8_int8", 80, 1, 100, 100, family="wgmma", cluster=16, ctas_per_sm=2,
        rank_when=(
            RankWhen(120, causal=1, head_dim=(65, 128), seqlen_q=(0, 2048)),
            RankWhen(95, tiles_max=64),
            RankWhen(110, seqlen_k=(4096, 8191)),
        ),
    ),
    FakeRow("sm110", abi.INT8_FP16, "int8_fp16", 60, 0, 110, 110, family="mma"),
    FakeRow("sm110", abi.INT8_FP8, "int8_fp8", 50, 1, 110, 110, family="mma"),
    FakeRow("sm110", abi.INT8_INT8, "int8_int8", 70, 0, 110, 110, family="mma"),
    FakeRow("sm110", abi.INT8_FP16, "half", 60, 0, 111, 111, family="mma", pv="fp16s", head_dims=(64, 96, 128, 256)),
    FakeRow("sm110", abi.INT4_FP16, "int4_fp16", 260, 2, 111, 111, family="mma", k8="i4", head_dims=(64, 96, 128, 256)),
    FakeRow("sm89", abi.INT8_FP16, "general_int8_fp16", 200, 0, 89, 89, general=True, head_dims=(64, 128, 256)),
    FakeRow("sm89", abi.INT8_FP8, "general_int8_fp8", 190, 1, 89, 89, general=True, head_dims=(64, 128, 256)),
)  # fmt: skip
ABSENCES = ((80, 87, abi.INT8_FP8, "these GPUs have no FP8 tensor cores"),)


def find_compiler() -> list[str] | None:
    """A C++ compiler: CXX, the system's, or zig's."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        return None
    return [sys.executable, "-m", "ziglang", "c++"]


def c_compiler(compiler: list[str]) -> list[str]:
    """The C compiler that belongs to a C++ compiler."""
    last = {"c++": "cc", "g++": "gcc", "clang++": "clang"}
    folder, name = os.path.split(compiler[-1])
    return [*compiler[:-1], os.path.join(folder, last.get(name, name))]


def templates(family: str) -> dict[str, dict[str, Any]]:
    """A family's kernel templates by id, from the manifest that declares them."""
    folder = {"portable": "portable", "mma": "sm80"}[family]
    manifest = tomllib.loads((ROOT / "kernels" / folder / "manifest.toml").read_text())
    return {kernel["id"]: kernel for kernel in manifest["kernel"]}


def signatures(row: FakeRow, dtype: str) -> dict[str, str]:
    """Signature of the kernel of each role, from the family's manifest or from WGMMA_ARGS."""
    pv = row.pv or {abi.INT8_FP16: dtype, abi.INT4_FP16: dtype, abi.INT8_INT8: "i8"}.get(row.precision, "fp8e4nv")
    scale = "bf16" if pv == "i8" else "fp32"
    names = {"*io": f"*{dtype}", "*qk": "*i8", "*pv": f"*{pv}", "*scale": f"*{scale}", "*$v_scale": f"*{scale}"}
    names["*$k8"] = f"*{row.k8}"
    out = {}
    if row.family == "wgmma":
        for role, args in WGMMA_ARGS.items():
            if role == "combine" and not row.combine:
                continue
            pairs = [arg.split(":") for arg in args]
            if row.precision == abi.INT8_FP16 and role == "attention":
                pairs = [["VMap", "tensormap"] if name == "V8" else [name, kind] for name, kind in pairs]
            out[role] = " ".join(f"{name}:{names.get(kind, kind)}" for name, kind in pairs)
        return out
    by_id = templates(row.family)
    int4 = ("smooth_q",) if row.k8 == "i4" else ()
    wanted = (*MMA_KERNELS, *int4) if row.family == "mma" else GENERAL_KERNELS if row.general else PLAIN_KERNELS
    for name in wanted:
        kernel = by_id[f"{row.family}.{name}"]
        out[kernel["role"]] = " ".join(f"{name}:{names.get(kind, kind)}" for name, kind in kernel["args"].items())
    return out


def portable_parameters(kernels: tuple[str, ...]) -> dict[str, list[str]]:
    """Parameter names by role, the compiler's own included, of PLAIN_KERNELS or GENERAL_KERNELS."""
    return {
        kernel["role"]: [*kernel["args"], "hidden0", "hidden1"]
        for name, kernel in templates("portable").items()
        if name.removeprefix("portable.") in kernels
    }


def mma_parameters() -> dict[str, list[str]]:
    """Parameter names of the mma family's kernels by role."""
    return {kernel["role"]: list(kernel["args"]) for kernel in templates("mma").values()}


def _quote(text: str) -> str:
    return json.dumps(text)


def build(folder: Path, compiler: list[str]) -> Path:
    """Builds into `folder` with the layout of a wheel (lib/, bundles/); returns the library."""
    arches = list(dict.fromkeys(row.arch for row in ROWS))
    kernels: list[str] = []
    rows: list[str] = []
    ranks: list[str] = []
    variants: list[str] = []
    index: dict[str, list[dict[str, object]]] = {arch: [] for arch in arches}
    sizes = dict.fromkeys(arches, 0)
    types: list[str] = []
    for number, row in enumerate(ROWS):
        bundle = arches.index(row.arch)
        target = folder / "bundles" / row.arch
        target.mkdir(parents=True, exist_ok=True)
        rows.append(
            f'{_quote(f"{row.arch}.fake.{row.name}")}, {bundle}, "{row.family}", {row.precision}, {row.accuracy}, '
            f"{row.rank}, {row.low}, {row.high}, {row.driver_min}, {FLAGS | GENERAL_FLAGS * row.general}u, "
            f"{1 << abi.FP16 | 1 << abi.BF16}u, {max(row.head_dims)}, {int(row.general)}, "
            f'8388608, 0.02, "{{}}", "{{}}", {len(ranks)}, {len(row.rank_when)}'
        )
        for when in row.rank_when:
            bounds = ", ".join(map(str, (*when.head_dim, *when.seqlen_q, *when.seqlen_k, when.tiles_max)))
            ranks.append(f"{when.rank}, {when.causal}, {bounds}")
        for head_dim in row.head_dims:
            for dtype, dtype_code in DTYPES.items():
                for causal in (0, 1):
                    uses = dict.fromkeys(ROLES, -1)
                    wgmma = row.family == "wgmma"
                    cuda = wgmma or row.family == "mma"
                    hidden = 0 if cuda else 2
                    for role, signature in signatures(row, dtype).items():
                        symbol = f"{row.arch}_{row.name}_{role}_{dtype}_d{head_dim}_c{causal}"
                        data = f"#{len(kernels):04d} {symbol} ".encode() * 20
                        digest = hashlib.sha256(data)
                        (target / f"{symbol}.cubin").write_bytes(data)
                        tile = COMBINE_TILE if role == "combine" else 128 if role == "attention" or cuda else 64
                        shared = row.shared if role == "attention" else 1024
                        launch = f"{row.cluster}, 1, {int(wgmma)}"
                        if role == "combine":
                            launch = "1, 1, 1"
                        if role == "attention":
                            launch = f"1, {row.ctas_per_sm}, {int(wgmma)}"
                        uses[role] = len(kernels)
                        kernels.append(
                            f"{bundle}, {_quote(symbol + '.cubin')}, {_quote(symbol)}, {_quote(signature)}, {hidden}, "
                            f"256, {shared}, 0, {tile}, {launch}, {len(data)}u, "
                            f"{{{', '.join(map(str, digest.digest()))}}}"
                        )
                        index[row.arch].append({"file": f"{symbol}.cubin", "sha256": digest.hexdigest()})
                        sizes[row.arch] += len(data)
                        letters = {"i32": "i", "i64": "l", "fp32": "f", "tensormap": "t"}
                        kinds = [item.split(":")[1] for item in signature.split()]
                        types.append(symbol + " " + "".join(letters.get(k, "p") for k in kinds) + "l" * hidden)
                    numbers = ", ".join(map(str, uses.values()))
                    variants.append(f"{number}, {head_dim}, {causal}, {dtype_code}, {{{numbers}}}")
    bundles = []
    for arch in arches:
        (folder / "bundles" / arch / "index.json").write_text(json.dumps({"schema": 1, "kernels": index[arch]}))
        bundles.append(f'{_quote(arch)}, "sm_fake", "12.9", 12000, {len(index[arch])}, {sizes[arch]}')
    absences = [f"{low}, {high}, {precision}, {_quote(reason)}" for low, high, precision, reason in ABSENCES]
    source = ['#include "table.h"', "namespace sagert {"]
    tables = {
        "Bundle": bundles,
        "Kernel": kernels,
        "Row": rows,
        "Rank": ranks,
        "Variant": variants,
        "Absence": absences,
    }
    for kind, entries in tables.items():
        body = "".join(f"  {{{entry}}},\n" for entry in entries)
        source.append(f"const {kind}Entry k{kind}s[] = {{\n{body}}};")
        source.append(f"const int32_t k{kind}Count = {len(entries)};")
    (folder / "kernel_table.cc").write_text("\n".join([*source, "}", ""]))
    (folder / "types.txt").write_text("\n".join(types) + "\n")
    library = folder / "lib" / "libsagert.so"
    library.parent.mkdir()
    sources = [folder / "kernel_table.cc", *sorted((ROOT / "host").rglob("*.cc"))]
    command = [*compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", '-DSAGERT_VERSION="0.1.0"', "-DSAGERT_BUILD", f"-I{ROOT}/include"]
    command += [f"-I{ROOT}/host", *map(str, sources), "-o", str(library), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def cached(compiler: list[str]) -> Path:
    """The fake build of the present sources: built once, shared by test processes."""
    digest = hashlib.sha256(repr(compiler).encode())
    for path in [Path(__file__), ROOT / "include/sagert.h", ROOT / "kernels/portable/manifest.toml"]:
        digest.update(path.read_bytes())
    for path in sorted((ROOT / "host").rglob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    uid = os.getuid() if hasattr(os, "getuid") else 0
    parent = Path(tempfile.gettempdir()) / f"sagert-tests-{uid}"
    parent.mkdir(mode=0o700, exist_ok=True)
    final = parent / digest.hexdigest()[:16]
    if not final.exists():
        work = Path(tempfile.mkdtemp(dir=parent))
        build(work, compiler)
        try:
            work.rename(final)
        except OSError:  # another process was faster
            shutil.rmtree(work)
    return final / "lib" / "libsagert.so"
