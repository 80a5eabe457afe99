# SPDX-License-Identifier: Apache-2.0
"""Packages of PTX: what they hold, where their rows serve, and that no wheel holds any of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from build_tools import build, expand, ptx, table
from build_tools.cache import Cache
from build_tools.errors import BuildError
from build_tools.manifest import load

ROOT = Path(__file__).resolve().parents[3]
SOURCE = """// SPDX-License-Identifier: Apache-2.0
extern "C" __global__ void __launch_bounds__(64) tiny_sum(const int* q, int* out) {
  out[threadIdx.x] = __dp4a(q[threadIdx.x], q[threadIdx.x + 1], HEAD_DIM);
}
"""
TEMPLATE = """
[[kernel]]
id = "tiny.sum"
role = "combine"
compiler = "cuda"
source = "portable/tiny.cu:tiny_sum"
args = { q = "*i32", out = "*i32" }
constants = { HEAD_DIM = "$head_dim" }
tile = 16
"""


@pytest.fixture
def mixed(kernels: Path) -> Path:
    """The small kernels folder: Triton and CUDA C++ kernels of a row with one head dim, and `ptx` in its [arch]."""
    (kernels / "portable" / "tiny.cu").write_text(SOURCE)
    with (kernels / "portable" / "manifest.toml").open("a") as file:
        file.write(TEMPLATE)
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text().replace("head_dim = [32, 64]", "head_dim = [64]")
    text = text.replace("shared_limit = 166912", "shared_limit = 166912\nptx = 80")
    text = text.replace("[[absent]]", '[[row.kernel]]\nuse = "tiny.sum"\nthreads = 64\n\n[[absent]]')
    path.write_text(text)
    return kernels


def test_package(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.cuda_nvrtc")
    tables: list[str] = []

    def library(root: Path, out: Path, text: Path, cache: Path, build: Path | None = None) -> Path:
        tables.append(text.read_text())
        return out / "lib" / "libsagert.so"

    monkeypatch.setattr(ptx, "build_library", library)
    cache = tmp_path / "cache"
    (site,) = ptx.make(ROOT, mixed, [], [], 90, tmp_path / "out", cache, 2)
    assert site == tmp_path / "out" / "sm80"
    assert (site / "sagert" / "api.py").read_bytes() == (ROOT / "sagert" / "api.py").read_bytes()
    bundle = site / "sagert" / "bundles" / "sm80"
    index = json.loads((bundle / "index.json").read_text())
    assert (index["target"], index["runs_on"]) == ("compute_80", ["8.0", "9.0"])
    assert index["rows"][0]["runs_on"] == ["8.0", "9.0"]
    assert {entry["compiler"] for entry in index["kernels"]} == {"triton", "cuda"}
    assert {path.name for path in bundle.iterdir()} == {"index.json", *(entry["file"] for entry in index["kernels"])}
    for entry in index["kernels"]:
        data = (bundle / entry["file"]).read_bytes()
        assert entry["file"].endswith(".ptx")
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["length"])
        assert data.endswith(b"\0")  # the driver is not told a length
        assert data.count(b"\0") == 1
        text = data[:-1].decode()
        assert re.search(r"^\.target sm_80$", text, re.MULTILINE)
        assert re.search(rf"\.entry {entry['symbol']}\(", text)
        assert f".{'maxntid' if entry['compiler'] == 'cuda' else 'reqntid'} {entry['threads']}" in text
    assert '"sm80.tiny.int8_fp16", 0, "portable", 1, 0, 100, 80, 90, 12000' in tables[0]

    # Machine code of the same jobs is another entry of the cache.
    (plan,) = (ptx.retarget(expand.expand(manifest), 90) for manifest in load(mixed))
    for built in build.build([plan], mixed, Cache(cache), jobs=2)[0].kernels:
        assert built.cubin.startswith(b"\x7fELF")
        assert built.file.endswith(".cubin")


def test_retarget_widens_and_keeps(mixed: Path) -> None:
    plan = expand.expand(load(mixed)[0])
    arch = dataclasses.replace(plan.manifest.arch, target="sm_120f", triton_capability=120, runs_on=(120, 121), ptx=89)
    rows = tuple(dataclasses.replace(row, runs_on=(120, 121)) for row in plan.rows)
    plan = dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, arch=arch), rows=rows)
    made = ptx.retarget(plan, 90)
    assert made.manifest.arch.runs_on == made.rows[0].runs_on == (90, 121)
    assert {(kernel.job.target, kernel.job.capability) for kernel in made.kernels} == {("sm_89", 89)}
    assert [kernel.job.label for kernel in made.kernels] == [kernel.job.label for kernel in plan.kernels]
    assert [variant.kernels for variant in made.variants] == [variant.kernels for variant in plan.variants]


def test_refusals(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"--arch sm80: PTX of compute_80 does not run on 7\.5: take a later --on"):
        ptx.make(ROOT, mixed, ["sm80"], [], 75, tmp_path, tmp_path, 1)
    path = mixed / "sm80" / "manifest.toml"
    path.write_text(path.read_text().replace("ptx = 80\n", ""))
    with pytest.raises(BuildError, match=r"--arch sm80: its \[arch\] names no ptx"):
        ptx.make(ROOT, mixed, ["sm80"], [], 90, tmp_path, tmp_path, 1)
    assert ptx.make(ROOT, mixed, [], [], 90, tmp_path, tmp_path, 1) == []


def test_mma_sync_architectures_can_be_tested_on_hopper() -> None:
    manifests = {manifest.arch.name: manifest for manifest in load(ROOT / "kernels")}
    bases = {name: manifest.arch.ptx for name, manifest in manifests.items() if manifest.arch.ptx is not None}
    assert bases == {"sm80": 80, "sm86": 86, "sm89": 89, "sm120": 89}
    for name in bases:
        plan = ptx.retarget(expand.expand(manifests[name]), 90)
        text = table.render([build.Bundle(plan, ())])
        for row in plan.rows:
            assert row.runs_on[0] <= 90 <= row.runs_on[1]
            assert f'{{"{row.id}", 0, ' in text
