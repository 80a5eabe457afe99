# SPDX-License-Identifier: Apache-2.0
"""Rows become variants; kernels that come out the same are compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_tools.errors import ManifestError
from build_tools.expand import expand
from build_tools.manifest import load


def test_variants(kernels: Path) -> None:
    plan = expand(load(kernels)[0])
    points = [tuple(variant.axes.values()) for variant in plan.variants]
    assert points == [(32, False, "fp16"), (32, True, "fp16"), (64, False, "fp16"), (64, True, "fp16")]
    for variant in plan.variants:
        assert set(variant.kernels) == {"kv_stats", "attention"}
        attention = plan.kernels[variant.kernels["attention"]]
        assert dict(attention.job.constants) == {"D": variant.axes["head_dim"], "CAUSAL": variant.axes["causal"]}
        assert attention.tile == (32 if variant.axes["causal"] else 64)
        assert dict(attention.job.args) == {"Q": "*i8", "K": "*i8", "Out": "*fp16", "n": "i32"}
        assert attention.job.threads == 128


def test_equal_kernels_are_one(kernels: Path) -> None:
    """kv_stats knows nothing of `causal` and must not be split by it."""
    plan = expand(load(kernels)[0])
    assert len(plan.kernels) == 2 + 4
    stats = {variant.kernels["kv_stats"] for variant in plan.variants}
    assert len(stats) == 2


def test_equal_kernels_of_two_rows_are_one(kernels: Path) -> None:
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text()
    row = text[text.index("[[row]]") : text.index("[[absent]]")]
    second = row.replace("sm80.tiny.int8_fp16", "sm80.tiny.second").replace('require = ["IMMA"]', 'require = ["LDG"]')
    second = second.replace("rank = 100", "rank = 90")
    path.write_text(text.replace("[[absent]]", second + "[[absent]]"))
    plan = expand(load(kernels)[0])
    assert len(plan.kernels) == 6
    attention = next(kernel for kernel in plan.kernels if kernel.role == "attention")
    assert attention.rows == ("sm80.tiny.int8_fp16", "sm80.tiny.second")
    assert attention.gates.require == ("IMMA", "LDG")


def test_rows_on_trial_are_built_where_they_are_named(kernels: Path) -> None:
    path = kernels / "sm80" / "manifest.toml"
    path.write_text(path.read_text().replace('precision = "int8_fp16"', 'trial = true\nprecision = "int8_fp16"', 1))
    (manifest,) = load(kernels)
    assert [row.trial for row in manifest.rows] == [True]
    assert expand(manifest).rows == ()
    assert (
        expand(manifest, trial=True).rows == expand(manifest, frozenset({"sm80.tiny.int8_fp16"})).rows == manifest.rows
    )


def test_one_and_true_differ(kernels: Path) -> None:
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text()
    path.write_text(
        text.replace(
            'options = { qk = "i8" }',
            'options = { qk = "i8", flag = [{ causal = true, value = true }, { value = 1 }] }',
        )
    )
    templates = kernels / "portable" / "manifest.toml"
    templates.write_text(templates.read_text().replace('{ D = "$head_dim" }', '{ D = "$head_dim", FLAG = "$flag" }'))
    assert len({variant.kernels["kv_stats"] for variant in expand(load(kernels)[0]).variants}) == 4


def test_symbols_are_distinct_and_stable(kernels: Path) -> None:
    first, second = expand(load(kernels)[0]), expand(load(kernels)[0])
    symbols = [kernel.job.symbol for kernel in first.kernels]
    assert len(set(symbols)) == len(symbols)
    assert symbols == [kernel.job.symbol for kernel in second.kernels]
    assert "sagert_sm80_attend_i8_fp16_d64_causal_w4" in symbols


def test_warps_may_depend_on_an_axis(kernels: Path) -> None:
    path = kernels / "sm80" / "manifest.toml"
    text = path.read_text()
    stats = text.index('use = "tiny.stats"')
    start = text.index("num_warps", stats)
    end = text.index("\n", start)
    warps = "num_warps = [{ head_dim = 64, value = 8 }, { value = 2 }]"
    path.write_text(text[:start] + warps + text[end:])
    for variant in expand(load(kernels)[0]).variants:
        plan = expand(load(kernels)[0])
        job = plan.kernels[variant.kernels["kv_stats"]].job
        assert (job.num_warps, job.threads) == ((8, 256) if variant.axes["head_dim"] == 64 else (2, 64))
    path.write_text(text[:start] + warps.replace("8", "7") + text[end:])
    with pytest.raises(ManifestError, match=r"num_warps = .*allowed: 1, 2, 4, 8, 16, 32"):
        load(kernels)


def test_row_filter(kernels: Path) -> None:
    assert not expand(load(kernels)[0], frozenset({"other"})).rows
