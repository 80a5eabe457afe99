# SPDX-License-Identifier: Apache-2.0
"""Real kernels through the compiler: the gates pass the good and name what is wrong with the bad."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from build_tools import build, expand, gates
from build_tools.bundle import Bundle
from build_tools.cache import Cache
from build_tools.errors import BuildError
from build_tools.manifest import load


def _build(kernels: Path, cache: Path) -> list[Bundle]:
    return build.build([expand.expand(manifest) for manifest in load(kernels)], kernels, Cache(cache), jobs=2)


def _smaller(kernels: Path) -> Path:
    """One variant is enough for a gate. Returns the architecture's manifest."""
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text().replace("head_dim = [32, 64], causal = [false, true]", "head_dim = [64], causal = [false]")
    path.write_text(text.replace('["causal", "lse"]', '["lse"]'))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('require = ["IMMA"]', 'require = ["IMMA", "QMMA"]', r"gate require: no QMMA .*matrix opcodes: IMMA \d+"),
        ('forbid = ["HMMA", "IGMMA"]', 'forbid = ["IMMA"]', r"gate forbid: \d+ IMMA in the machine code"),
        ('require = ["IMMA"]', "max_registers = 8", r"gate registers: \d+ per thread, max_registers is 8"),
    ],
)
def test_gate(kernels: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    path = _smaller(kernels)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BuildError) as caught:
        _build(kernels, tmp_path / "cache")
    assert re.search(r"sm80: row sm80\.tiny\.int8_fp16: kernel sagert_sm80_attend\S* .*" + message, str(caught.value))


def test_spill(kernels: Path, tmp_path: Path) -> None:
    path = _smaller(kernels)
    text = path.read_text().replace('"tiny.attend"\nnum_warps = 4', '"tiny.spills"\nnum_warps = 1')
    text = re.sub(r"options = \{ block_m.*\n", "", text)
    path.write_text(re.sub(r"gates = .*\n", "", text))
    with pytest.raises(BuildError, match=r"gate spill: [1-9]\d* bytes of stack"):
        _build(kernels, tmp_path / "cache")


def test_parameters_and_shared_memory(kernels: Path, tmp_path: Path) -> None:
    import dataclasses

    _smaller(kernels)
    (bundle,) = _build(kernels, tmp_path / "cache")
    built = next(built for built in bundle.kernels if built.kernel.role == "attention")
    facts, kernel = built.facts, built.kernel
    assert facts.params == ("ptr", "ptr", "ptr", "u32", "ptr", "ptr")
    assert facts.sass["IMMA"] > 0
    gates.check(kernel, facts, 166912)

    def refused(message: str, limit: int = 166912, **changes: object) -> None:
        with pytest.raises(BuildError, match=message):
            gates.check(kernel, dataclasses.replace(facts, **changes), limit)  # type: ignore[arg-type]

    refused(r"gate shared: \d+ bytes dynamic", limit=16)
    refused("gate parameters: 5 in the PTX", params=facts.params[:-1])
    refused(
        "gate parameters: n is u64 in the PTX, the manifest says i32", params=("ptr", "ptr", "ptr", "u64", "ptr", "ptr")
    )
    refused("gate parameters: Out is u64 in the PTX", params=("ptr", "ptr", "u64", "u32", "ptr", "ptr"))
    refused("gate scratch: 256 bytes of global scratch", global_scratch=256)
    refused("gate threads: compiled for 384", threads=384)
    refused("gate symbol", symbols=("a", "b"))
    refused("tensor descriptors", tensor_descriptors=True)
    refused("gate spill: 0 bytes of stack, 8 of local", local=8)


def test_dependent_launch(kernels: Path, tmp_path: Path) -> None:
    """A kernel that may start before what is in front of it ends must wait for that itself (griddepcontrol.wait)."""
    import dataclasses

    _smaller(kernels)
    (bundle,) = _build(kernels, tmp_path / "cache")
    built = next(built for built in bundle.kernels if built.kernel.role == "attention")
    early = dataclasses.replace(built.kernel, job=dataclasses.replace(built.kernel.job, dependent_launch=True))
    with pytest.raises(BuildError, match=r"gate dependent_launch: it may start before .* ends, and never waits"):
        gates.check(early, built.facts, 166912)
    gates.check(early, dataclasses.replace(built.facts, sass={**built.facts.sass, "ACQBULK": 1}), 166912)


def test_compiler_errors_name_the_kernel(kernels: Path, tmp_path: Path) -> None:
    _smaller(kernels)
    source = kernels / "portable" / "tiny.py"
    source.write_text(source.read_text().replace("s = tl.dot(q, k)", "s = tl.dot(q, unknown)"))
    with pytest.raises(BuildError, match=r"sagert_sm80_attend\S* \(portable/tiny.py:attend\): Triton ended with 1"):
        _build(kernels, tmp_path / "cache")


def test_manifest_and_source_disagree(kernels: Path, tmp_path: Path) -> None:
    _smaller(kernels)
    path = kernels / "portable" / "manifest.toml"
    path.write_text(
        path.read_text().replace(
            'args = { X = "*io", Y = "*fp32", n = "i32" }', 'args = { X = "*io", n = "i32", Y = "*fp32" }'
        )
    )
    with pytest.raises(BuildError, match="run-time parameters are"):
        _build(kernels, tmp_path / "cache")
