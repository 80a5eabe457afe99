# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels take the whole way from manifest to bundle and table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("nvidia.cuda_nvrtc")

from build_tools import build, expand
from build_tools.bundle import Bundle
from build_tools.cache import Cache
from build_tools.errors import BuildError
from build_tools.manifest import load

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
    text = (tmp_path / "table.cc").read_text()
    assert text.count('"tiny_mma", "q:*i32 k:*i32 out:*i32 scale:i32", 0, 32, 1024, 16') == 6


def test_compiler_log(cuda: Path, tmp_path: Path) -> None:
    (cuda / "portable" / "tiny.cu").write_text(SOURCE.replace("CAUSAL;", "UNKNOWN;"))
    with pytest.raises(BuildError, match=r'sm80: tiny_mma .*NVRTC refused it:\n(.*\n)*.*"UNKNOWN" is undefined'):
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
