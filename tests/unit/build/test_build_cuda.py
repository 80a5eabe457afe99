# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels take the whole way from manifest to bundle and table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("nvidia.cuda_nvrtc")

from build_tools import build, expand
from build_tools.bundle import Bundle
from build_tools.cache import Cache
from build_tools.errors import BuildError, ManifestError
from build_tools.manifest import load
from build_tools.vocabulary import ROLES

SOURCE = """// SPDX-License-Identifier: Apache-2.0
#include "mma.cuh"

extern "C" __global__ void __launch_bounds__(32) tiny_mma(const int* q, const int* k, int* out, int scale) {
  int c[4] = {0, 0, 0, 0};
  mma_s8(c, q + 4 * threadIdx.x, k + 2 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = c[i] * scale + HEAD_DIM + CAUSAL;
}
"""
HEADER = """// SPDX-License-Identifier: Apache-2.0
#pragma once
__device__ inline void mma_s8(int (&c)[4], const int* a, const int* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
"""
TEMPLATE = """
[[kernel]]
id = "tiny.mma"
role = "attention"
compiler = "cuda"
source = "portable/tiny.cu:tiny_mma"
args = { q = "*i32", k = "*i32", out = "*i32", scale = "i32" }
constants = { HEAD_DIM = "$head_dim", CAUSAL = "$causal" }
tile = 16
"""
ARCH = """
schema = 1
[arch]
name = "{name}"
target = "{target}"
triton_capability = {capability}
runs_on = ["{runs_on}", "{runs_on}"]
driver_min = 12000
shared_limit = 49152
[[row]]
id = "{name}.tiny.int8_int8"
family = "mma"
precision = "int8_int8"
rank = 1
accuracy = {{ class = "low", rel_l1_randn = 0.1 }}
quant = {{ qk = "int8" }}
requires = {{ head_dim_max = 64, seqlen_max = 64, flags = ["causal"] }}
axes = {{ head_dim = [64], causal = [false, true], dtype = ["fp16"] }}
[[row.kernel]]
use = "tiny.mma"
threads = 32
shared = 1024
gates = {{ require = ["IMMA"], forbid = ["IGMMA"] }}
"""
MAPPED = """// SPDX-License-Identifier: Apache-2.0
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};
#if !MAP_TENSORMAP || CAUSAL != SCALE_BF16 || CAUSAL == SCALE_FP32 || SHARED != 1024 * CLUSTER
#error
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    mapped(const void* scale, const __grid_constant__ TensorMap map, unsigned long long* out) {
  out[threadIdx.x] = map.opaque[3] + CLUSTER;
}
"""
MAPPED_TEMPLATE = """
[[kernel]]
id = "tiny.mapped"
role = "attention"
compiler = "cuda"
source = "portable/mapped.cu:mapped"
args = { scale = "*$scale", map = "tensormap", out = "*i64" }
constants = { CAUSAL = "$causal", THREADS = "$threads", CLUSTER = "$cluster", SHARED = "$shared" }
tile = 16
"""
MAPPED_USE = """use = "tiny.mapped"
threads = [{ head_dim = 64, value = 128 }, { value = 256 }]
cluster = [{ causal = true, value = 16 }, { value = 2 }]
shared = [{ causal = true, value = 16384 }, { value = 2048 }]
ctas_per_sm = 2
options = { scale = [{ causal = true, value = "bf16" }, { value = "fp32" }] }
"""
TARGETS = [("sm80", "sm_80", 80, "8.0"), ("sm90", "sm_90a", 90, "9.0"), ("sm120", "sm_120f", 120, "12.0")]


@pytest.fixture
def cuda(kernels: Path) -> Path:
    """The small kernels folder with three architectures whose rows are of CUDA C++."""
    (kernels / "common").mkdir()
    (kernels / "common" / "mma.cuh").write_text(HEADER)
    (kernels / "portable" / "tiny.cu").write_text(SOURCE)
    with (kernels / "portable" / "manifest.toml").open("a") as file:
        file.write(TEMPLATE)
    for name, target, capability, runs_on in TARGETS:
        (kernels / name).mkdir(exist_ok=True)
        text = ARCH.format(name=name, target=target, capability=capability, runs_on=runs_on)
        (kernels / name / "manifest.toml").write_text(text)
    return kernels


def _build(kernels: Path, cache: Path) -> list[Bundle]:
    return build.build([expand.expand(manifest) for manifest in load(kernels)], kernels, Cache(cache))


def test_whole_path(cuda: Path, tmp_path: Path) -> None:
    bundles = _build(cuda, tmp_path / "cache")
    build.emit(bundles, tmp_path / "out", tmp_path / "table.cc")
    assert [bundle.plan.manifest.arch.name for bundle in bundles] == ["sm80", "sm90", "sm120"]
    for bundle in bundles:
        name = bundle.plan.manifest.arch.name
        index = json.loads((tmp_path / "out" / "bundles" / name / "index.json").read_text())
        assert len(index["kernels"]) == 2
        for entry in index["kernels"]:
            assert (entry["symbol"], entry["threads"], entry["shared"]) == ("tiny_mma", 32, 1024)
            assert entry["sass"]["IMMA"] >= 1
            assert entry["signature"] == "q:*i32 k:*i32 out:*i32 scale:i32"
            assert (entry["cluster"], entry["ctas_per_sm"], entry["dependent_launch"]) == (1, 1, False)
        files = [f"sagert_{name}_mma_tiny_mma_head_dim64_{causal}t32.cubin" for causal in ("", "causal_")]
        assert [entry["file"] for entry in index["kernels"]] == files
    text = (tmp_path / "table.cc").read_text()
    assert text.count('"tiny_mma", "q:*i32 k:*i32 out:*i32 scale:i32", 0, 32, 1024, 0, 16, 1, 1, 0') == 6
    for i in range(6):
        kernels = [i if role == "attention" else -1 for role in ROLES]
        assert text.count("{" + ", ".join(map(str, kernels)) + "}") == 1


@pytest.fixture
def mapped(cuda: Path) -> Path:
    """One architecture, whose row is of the kernel with a tensor map."""
    for name in ("sm80", "sm120"):
        (cuda / name / "manifest.toml").unlink()
    (cuda / "portable" / "mapped.cu").write_text(MAPPED)
    with (cuda / "portable" / "manifest.toml").open("a") as file:
        file.write(MAPPED_TEMPLATE)
    path = cuda / "sm90" / "manifest.toml"
    text = path.read_text().replace("head_dim = [64]", "head_dim = [32, 64]")
    path.write_text(text[: text.index('use = "tiny.mma"')] + MAPPED_USE)
    return cuda


def test_tensor_maps_and_launch_settings(mapped: Path, tmp_path: Path) -> None:
    (bundle,) = _build(mapped, tmp_path / "cache")
    assert len(bundle.kernels) == 4
    for built in bundle.kernels:
        (axes,) = built.kernel.axes
        cluster, threads = (16 if axes["causal"] else 2), (128 if axes["head_dim"] == 64 else 256)
        scale = "bf16" if axes["causal"] else "fp32"
        job = built.kernel.job
        assert (job.symbol, job.cluster, job.ctas_per_sm, job.dependent_launch) == ("mapped", cluster, 2, False)
        assert (built.facts.threads, built.facts.shared) == (threads, 1024 * cluster)
        assert built.facts.params == ("u64", "b8[128] align 64", "u64")
        assert dict(job.args) == {"scale": f"*{scale}", "map": "tensormap", "out": "*i64"}
        assert re.fullmatch(rf"sagert_sm90_mma_mapped_{scale}_\w*cluster{cluster}_\w*t{threads}\.cubin", built.file)
    build.emit([bundle], tmp_path / "out", tmp_path / "table.cc")
    text = (tmp_path / "table.cc").read_text()
    assert text.count('"scale:*bf16 map:tensormap out:*i64", 0, 128, 16384, 0, 16, 16, 2, 0') == 1


def test_tensor_map_gate(mapped: Path, tmp_path: Path) -> None:
    (mapped / "portable" / "mapped.cu").write_text(MAPPED.replace("alignas(64)", "alignas(8)"))
    message = r"gate parameters: map is b8\[128\] align 8 in the PTX, the manifest says tensormap"
    with pytest.raises(BuildError, match=message):
        _build(mapped, tmp_path / "cache")


def test_static_shared_memory_is_the_kernels_own(cuda: Path, tmp_path: Path) -> None:
    """From capability 9.0 on the compiler's figure includes 1 KB that the system takes."""
    source = SOURCE.replace("int c[4]", "__shared__ volatile int x[64];\n  x[threadIdx.x] = scale;\n  int c[4]")
    (cuda / "portable" / "tiny.cu").write_text(source)
    found = {(b.plan.manifest.arch.name, k.facts.static_shared) for b in _build(cuda, tmp_path) for k in b.kernels}
    assert found == {("sm80", 256), ("sm90", 256), ("sm120", 256)}


def test_dependent_launch(cuda: Path) -> None:
    path = cuda / "sm80" / "manifest.toml"
    text = path.read_text().replace("shared = 1024", "shared = 1024\ndependent_launch = true")
    path.write_text(text + '[[row.kernel]]\nuse = "tiny.stats"\nnum_warps = 4\n')
    plan = expand.expand(next(manifest for manifest in load(cuda) if manifest.arch.name == "sm80"))
    assert {(k.role, k.job.dependent_launch) for k in plan.kernels} == {("kv_stats", False), ("attention", True)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ctas_per_sm = 2", "ctas_per_sm = 0", r"ctas_per_sm = 0: expected an integer from 1 to 32, or a list of \{"),
        ("value = 16 }", "value = 17 }", r"cluster = \[.*expected an integer from 1 to 16, or a list"),
        ("{ head_dim = 64, value = 128 }", "{ head_dim = 64 }", r"threads = \[.*expected an integer from 32 to 1024"),
        (
            "{ head_dim = 64, value = 128 }",
            "128",
            r"threads = \[.*expected an integer from 32 to 1024, or a list of \{",
        ),
        ("{ head_dim = 64, value", "{ headdim = 64, value", r"'tiny\.mapped': threads: 'headdim' is no axis; allowed"),
        (", { value = 256 }]", "]", r"kernel 'tiny\.mapped': threads: no entry fits \{'head_dim': 32"),
        ("threads = [", "warps = [", r"threads is missing: add threads = <an integer>"),
        ("ctas_per_sm = 2", 'ctas_per_sm = "2"', r"ctas_per_sm = '2': expected an integer, not a string"),
        (
            "options = { scale",
            "options = { cluster = 2, scale",
            r"options = .*does not read 'cluster'; it reads causal, s",
        ),
        ('value = "bf16"', 'value = "bf17"', r"kernel 'tiny\.mapped': scale points to 'bf17'; allowed: io, i1"),
        ("ctas_per_sm = 2", "num_warps = 2", r"num_warps = 2: unknown key; allowed: use, .*cluster, ctas_per_sm, dep"),
    ],
)
def test_launch_setting_mistakes(mapped: Path, old: str, new: str, message: str) -> None:
    path = mapped / "sm90" / "manifest.toml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(ManifestError) as caught:
        [expand.expand(manifest) for manifest in load(mapped)]
    assert re.search(message, str(caught.value)), str(caught.value)


def test_triton_kernels_take_no_tensor_maps(cuda: Path) -> None:
    path = cuda / "portable" / "manifest.toml"
    path.write_text(path.read_text().replace('{ X = "*io", Y', '{ X = "tensormap", Y'))
    with pytest.raises(ManifestError, match=r"X has type 'tensormap'; allowed: i1, .*tensormap \(of CUDA kernels\)"):
        load(cuda)


def test_compiler_log(cuda: Path, tmp_path: Path) -> None:
    (cuda / "portable" / "tiny.cu").write_text(SOURCE.replace("CAUSAL;", "UNKNOWN;"))
    with pytest.raises(
        BuildError,
        match=r'sm80: sagert_sm80_mma_tiny_mma_head_dim64_t32 .*NVRTC refused it:\n(.*\n)*.*"UNKNOWN" is undefined',
    ):
        _build(cuda, tmp_path / "cache")


def test_parameters(cuda: Path, tmp_path: Path) -> None:
    path = cuda / "portable" / "manifest.toml"
    path.write_text(path.read_text().replace('scale = "i32" }', 'scale = "i64" }'))
    with pytest.raises(BuildError, match="gate parameters: scale is u32 in the PTX, the manifest says i64"):
        _build(cuda, tmp_path / "cache")


def test_included_files_are_part_of_the_cache_key(cuda: Path) -> None:
    from build_tools import cache

    job = expand.expand(load(cuda)[0]).kernels[0].job
    before = cache.key(job, cuda)
    (cuda / "common" / "mma.cuh").write_text(HEADER + "\n// changed\n")
    cache.source_digest.cache_clear()
    assert cache.key(job, cuda) != before
