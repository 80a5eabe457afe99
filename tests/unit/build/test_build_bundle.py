# SPDX-License-Identifier: Apache-2.0
"""Bundles, index.json and the kernel table: what is in them, that they are reproducible, and what the cache does."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from build_tools import build, cache, compile_triton, expand, table
from build_tools.bundle import Bundle, index, write
from build_tools.expand import Job
from build_tools.manifest import load

ROOT = Path(__file__).resolve().parents[3]
RANKS = """
[[row.rank_when]]
rank = 120
causal = true
head_dim = 64
seqlen_q_max = 2048

[[row.rank_when]]
rank = 130
seqlen_k_min = 10
tiles_max = 66

[[row.rank_when]]
rank = 140
head_dim = 32

"""


def _build(kernels: Path, folder: Path) -> list[Bundle]:
    return build.build([expand.expand(manifest) for manifest in load(kernels)], kernels, cache.Cache(folder), jobs=2)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_build_is_reproducible_and_complete(kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernels / "sm80" / "manifest.toml"
    path.write_text(path.read_text().replace("head_dim = [32, 64]", "head_dim = [64]"))
    first = _build(kernels, tmp_path / "cache")
    build.emit(first, tmp_path / "one", tmp_path / "one.cc")
    moved = tmp_path / "elsewhere" / "kernels"
    shutil.copytree(kernels, moved)
    second = _build(moved, tmp_path / "another cache")
    build.emit(second, tmp_path / "two", tmp_path / "two.cc")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    assert (tmp_path / "one.cc").read_bytes() == (tmp_path / "two.cc").read_bytes()

    written = json.loads((tmp_path / "one/bundles/sm80/index.json").read_text())
    assert (written["schema"], written["arch"], written["target"], written["toolkit"]) == (1, "sm80", "sm_80", "12.9")
    assert written["runs_on"] == ["8.0", "8.7"]
    assert len(written["kernels"]) == 3
    for entry in written["kernels"]:
        data = (tmp_path / "one/bundles/sm80" / entry["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["length"])
        assert entry["symbol"].encode() in data
        assert b"/" + tmp_path.name.encode() not in data

    # Nothing changed: nothing is compiled.
    def refuse(job: Job, folder: Path) -> compile_triton.Compiled:
        raise AssertionError(job.symbol)

    monkeypatch.setattr(compile_triton, "compile_job", refuse)
    assert table.render(_build(kernels, tmp_path / "cache")) == (tmp_path / "one.cc").read_text()

    # Whatever is in the way, the folder ends up holding the bundles alone.
    (tmp_path / "one/bundles/sm80/stale.cubin").write_bytes(b"")
    (tmp_path / "one/bundles/sm12").mkdir()
    write(first, tmp_path / "one" / "bundles")
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_table_compiles(kernels: Path, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    path = kernels / "sm80" / "manifest.toml"
    path.write_text(path.read_text().replace("[[absent]]", RANKS + "[[absent]]"))
    bundles = [Bundle(expand.expand(manifest), ()) for manifest in load(kernels)]
    assert index(bundles[0])["rows"][0]["rank_when"] == [
        {"rank": 120, "causal": True, "head_dim": 64, "seqlen_q_max": 2048},
        {"rank": 130, "seqlen_k_min": 10, "tiles_max": 66},
        {"rank": 140, "head_dim": 32},
    ]
    text = table.render(bundles)
    most = 2**63 - 1
    assert f"{{120, 1, 33, 64, 0, 2048, 0, {most}, {most}}},\n" in text
    assert f"{{130, -1, 0, {most}, 0, {most}, 10, {most}, 66}},\n" in text
    assert f"{{140, -1, 1, 32, 0, {most}, 0, {most}, {most}}},\n" in text
    assert "kRankCount = 3;" in text
    assert '"sm80.tiny.int8_fp16", 0, "portable", 1, 0, 100, 80, 87, 12000, 3u, 2u, 64, 0, 1024, 0.0135' in text
    assert '"{\\"qk\\":\\"int8\\"}", 0, 3}' in text
    assert '{80, 87, 2, "no FP8 tensor cores"}' in text
    (tmp_path / "table.cc").write_text(text)
    command = [
        sys.executable,
        str(ROOT / "build_tools" / "zig_cxx.py"),
        "-std=c++17",
        "-c",
        "-Wall",
        "-Werror",
        "-o",
        str(tmp_path / "table.o"),
    ]
    done = subprocess.run([*command, f"-I{ROOT}", str(tmp_path / "table.cc")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "expected"), [('a"b\\c', '"a\\"b\\\\c"'), ("what??/", '"what\\077\\077/"'), ("é\n1", '"\\303\\251\\0121"')]
)
def test_literal(text: str, expected: str) -> None:
    assert table.literal(text) == expected


def test_cache_key_covers_the_sources(kernels: Path) -> None:
    job = expand.expand(load(kernels)[0]).kernels[0].job
    cache.source_digest.cache_clear()
    before = cache.key(job, kernels)
    cache.source_digest.cache_clear()
    assert cache.key(job, kernels) == before
    helper = kernels / "portable" / "helper.py"
    helper.write_text(helper.read_text() + "\n\n# A comment changes nothing.\n")
    cache.source_digest.cache_clear()
    assert cache.key(job, kernels) == before
    helper.write_text(helper.read_text().replace("x + x", "2 * x"))
    cache.source_digest.cache_clear()
    assert cache.key(job, kernels) != before


def test_damaged_cache_entry_is_absent(kernels: Path, tmp_path: Path) -> None:
    from build_tools.cubin import Facts

    facts = Facts(("k",), 128, 0, 0, 32, 0, 0, 0, 0, False, ("ptr",), {"IMMA": 2})
    store = cache.Cache(tmp_path)
    assert store.get("ab12") is None
    store.put("ab12", b"cubin", facts)
    assert store.get("ab12") == (b"cubin", facts)
    (path,) = tmp_path.rglob("kernel.cubin")
    path.write_bytes(b"cubim")
    assert store.get("ab12") is None
    store.put("ab12", b"cubin", facts)
    assert store.get("ab12") == (b"cubin", facts)
    (path.parent / "facts.json").write_text("{")
    assert store.get("ab12") is None
    assert not list(tmp_path.rglob(".new-*"))
