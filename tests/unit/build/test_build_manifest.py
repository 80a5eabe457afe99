# SPDX-License-Identifier: Apache-2.0
"""Every mistake in a manifest is an error that names the file, the row, the key and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from build_tools import expand
from build_tools.errors import ManifestError
from build_tools.manifest import Manifest, load


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    path.write_text(text.replace(old, new))


ROW = r"kernels/sm80/manifest\.toml: row 'sm80\.tiny\.int8_fp16'"
ARCH_MISTAKES = [
    ("schema = 1", "schema = 2", r"sm80/manifest\.toml: schema = 2: .*schema 1"),
    ("schema = 1", "schema = ", r"sm80/manifest\.toml: not valid TOML"),
    ("rank = 100", "rank = 100\nrnak = 1", ROW + r": rnak = 1: unknown key; allowed: id, .*rank"),
    ("rank = 100", "", ROW + r": rank is missing: add rank = <an integer>"),
    ("rank = 100", 'rank = "high"', ROW + r": rank = 'high': expected an integer, not a string"),
    ("rank = 100", "rank = true", ROW + r": rank = True: expected an integer, not true or false"),
    ("rank = 100", "rank = 100\ntrial = 1", ROW + r": trial = 1: expected true or false, not an integer"),
    ("rank = 100", "rank = -1", ROW + r": rank = -1: expected an integer of at least 0"),
    ('precision = "int8_fp16"', 'precision = "int7"', ROW + r": precision = 'int7': allowed: int8_fp16, int8_fp8"),
    ('id = "sm80.tiny.int8_fp16"', 'id = "A B"', r"row 'A B': id = 'A B': allowed: lower-case"),
    ('class = "high"', 'class = "best"', ROW + r": accuracy: class = 'best': allowed: high, standard, low"),
    ('"lse"]', '"lsee"]', ROW + r": requires: flags = .*'lsee' is unknown; allowed: causal, lse"),
    ('"causal", "lse"]', '"lse"]', ROW + r": requires: flags = .*'causal' must be listed exactly if"),
    ("head_dim_max = 64", "head_dim_max = 128", ROW + r": requires: head_dim_max = 128: no kernel is built for it"),
    (
        "head_dim_max = 64",
        'head_dim_max = 64, head_dim_v = "all"',
        ROW + r": requires: head_dim_v = 'all': allowed: equal, any",
    ),
    ("head_dim = [32, 64]", "head_dim = [33, 64]", ROW + r": axes: head_dim = .*33 is not allowed: multiples of 16"),
    ("head_dim = [32, 64]", "head_dim = []", ROW + r": axes: head_dim = \[\]: expected at least one"),
    ("causal = [false, true]", "causal = [0, true]", ROW + r": axes: causal = .*0 is not allowed: false, true"),
    ('dtype = ["fp16"]', 'dtype = ["fp32"]', ROW + r": axes: dtype = .*'fp32' is not allowed: fp16, bf16"),
    (
        'dtype = ["fp16"]',
        'dtype = ["fp16"], split = [1]',
        ROW + r": axes: split = \[1\]: unknown key; allowed: head_dim",
    ),
    (
        'use = "tiny.stats"',
        'use = "tiny.stat"',
        ROW + r": kernel 'tiny\.stat': use = .*no such kernel template; .*tiny\.stats",
    ),
    ('use = "tiny.stats"', 'use = "tiny.spills"', ROW + r": kernel = .*at most one of every other role"),
    (
        "options = { block_m",
        "options = { blockm",
        r"'tiny\.attend': options = .*does not read 'blockm'; it reads .*block_m",
    ),
    ('options = { qk = "i8" }', "", r"'tiny\.attend': '\$qk' has no value: add qk to options"),
    (
        'options = { qk = "i8" }',
        'options = { qk = "i8", pv = "io" }',
        ROW + r": options = .*no kernel of this row reads 'pv'",
    ),
    (
        "{ causal = true, value = 32 }, { value = 64 }",
        "{ causal = true, value = 32 }",
        r"options: block_m: no entry fits",
    ),
    ("{ causal = true, value = 32 }", "{ casual = true, value = 32 }", r"options: block_m: 'casual' is no axis"),
    ("{ causal = true, value = 32 }", "{ causal = true }", r"options: block_m: .*expected \{ <axis>"),
    ("{ causal = true, value = 32 }", '{ causal = true, value = "x" }', r"tile = 'x': expected a positive integer"),
    ('require = ["IMMA"]', 'require = ["IMMA.16832"]', r"gates: 'IMMA\.16832' is no SASS opcode"),
    ('require = ["IMMA"]', 'requires = ["IMMA"]', r"gates: requires = .*unknown key; allowed: require, forbid"),
    ('target = "sm_80"', 'target = "80"', r"arch: target = '80': expected sm_<number>"),
    ('name = "sm80"', 'name = "sm81"', r"arch: name = 'sm81': must be the folder's name, 'sm80'"),
    ('runs_on = ["8.0", "8.7"]', 'runs_on = ["8.7", "8.0"]', r"arch: runs_on = .*lowest capability is above"),
    ('runs_on = ["8.0", "8.7"]', 'runs_on = ["80"]', r"arch: runs_on = .*expected the lowest and the highest"),
    *[
        ("[[absent]]", f"[[row.rank_when]]\n{keys}\n[[absent]]", ROW + message)
        for keys, message in [
            ("causal = true", r": rank_when: rank is missing"),
            ("rank = 120", r": rank_when: rank = 120: has no condition"),
            ("rank = 120\nseqlen = 1", r": rank_when: seqlen = 1: unknown key; allowed: rank, causal, .*tiles_max"),
            ("rank = 120\ncausal = 1", r": rank_when: causal = 1: expected true or false"),
            ("rank = 120\nhead_dim = 128", r": rank_when: head_dim = 128: allowed: 32, 64"),
            ("rank = 120\nseqlen_q_max = -1", r": rank_when: seqlen_q_max = -1: expected an integer of at least 0"),
            ("rank = 120\nseqlen_k_min = 2\nseqlen_k_max = 1", r": rank_when: seqlen_k_min = 2: is above .*_max = 1"),
        ]
    ],
    ('precision = "int8_fp8"', 'precision = "int8_fp16"', r"absent 'int8_fp16': precision = .*has a row of that"),
    ('reason = "no FP8 tensor cores"', "", r"absent 'int8_fp8': reason is missing"),
]
TEMPLATE_MISTAKES = [
    (
        'role = "kv_stats"',
        'role = "stats"',
        r"portable/manifest\.toml: kernel 'tiny\.stats': role = 'stats': allowed: kv_stats, .*attention, combine",
    ),
    ('Y = "*fp32"', 'Y = "*float"', r"kernel 'tiny\.stats': args = .*Y has type '\*float'; allowed"),
    ('aligned = ["X", "Y"]', 'aligned = ["X", "Z"]', r"aligned = .*'Z' is unknown; allowed: X, Y, n"),
    ('"portable/tiny.py:stats"', '"portable/none.py:stats"', r"source = .*there is no kernels/portable/none\.py"),
    ('"portable/tiny.py:stats"', '"portable/tiny.py"', r"source = .*expected '<file>\.py:<function>'"),
    ('tile = "$block_m"', 'tile = "block_m"', r"kernel 'tiny\.attend': tile = .*expected a positive integer or"),
    ('id = "tiny.spills"', 'id = "tiny.stats"', r"kernel 'tiny\.stats': id already used in kernels/portable"),
]


def _expand_all(kernels: Path) -> list[Manifest]:
    manifests = load(kernels)
    for manifest in manifests:
        expand.expand(manifest)
    return manifests


@pytest.mark.parametrize(("old", "new", "message"), ARCH_MISTAKES, ids=[m[2] for m in ARCH_MISTAKES])
def test_arch_mistake(kernels: Path, old: str, new: str, message: str) -> None:
    _edit(kernels / "sm80" / "manifest.toml", old, new)
    with pytest.raises(ManifestError) as caught:
        _expand_all(kernels)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("old", "new", "message"), TEMPLATE_MISTAKES, ids=[m[2] for m in TEMPLATE_MISTAKES])
def test_template_mistake(kernels: Path, old: str, new: str, message: str) -> None:
    _edit(kernels / "portable" / "manifest.toml", old, new)
    with pytest.raises(ManifestError) as caught:
        _expand_all(kernels)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_duplicate_row(kernels: Path) -> None:
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text()
    row = text[text.index("[[row]]") : text.index("[[absent]]")]
    path.write_text(text + row)
    with pytest.raises(ManifestError, match=r"row 'sm80\.tiny\.int8_fp16': id already used in kernels/sm80"):
        load(kernels)


def test_ranks_must_not_tie(kernels: Path) -> None:
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text()
    row = text[text.index("[[row]]") : text.index("[[absent]]")].replace("sm80.tiny.int8_fp16", "sm80.tiny.second")
    message = r"row 'sm80\.tiny\.second': rank 100 is a rank of .*row 'sm80\.tiny\.int8_fp16' too: no two may tie"
    path.write_text(text + row)
    with pytest.raises(ManifestError, match=message):
        load(kernels)
    row = row.replace("rank = 100", "rank = 90")
    path.write_text(text + row + "[[row.rank_when]]\nrank = 100\ncausal = true\n")
    with pytest.raises(ManifestError, match=message):
        load(kernels)
    path.write_text(text + row + "[[row.rank_when]]\nrank = 110\ncausal = true\n")
    load(kernels)
    # No device has both.
    path.write_text(text.replace('"8.7"]', '"8.9"]') + row.replace("rank = 90", 'runs_on = ["8.9", "8.9"]\nrank = 100'))
    with pytest.raises(ManifestError, match=message):
        load(kernels)
    path.write_text(text + row.replace("rank = 90", 'runs_on = ["8.9", "8.9"]\nrank = 100'))
    load(kernels)


def test_no_manifests(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no \*/manifest\.toml"):
        load(tmp_path)


def test_good_manifest(kernels: Path) -> None:
    (manifest,) = _expand_all(kernels)
    assert manifest.arch.runs_on == (80, 87)
    assert [row.id for row in manifest.rows] == ["sm80.tiny.int8_fp16"]
    assert manifest.absences[0].reason == "no FP8 tensor cores"


def test_shipped_manifests_are_good() -> None:
    root = Path(__file__).resolve().parents[3]
    manifests = _expand_all(root / "kernels")
    assert "sm90" in [manifest.arch.name for manifest in manifests]
