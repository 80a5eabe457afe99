# SPDX-License-Identifier: Apache-2.0
"""Rows with Q and K in INT4, without a GPU: against the reference and against float64 attention."""

import math

import pytest

from tests.emulator import cases
from tests.emulator.cases import Case

PRECISIONS = ("int4_fp16", "int4_int8")


def run(rows, function, *arguments):
    return rows.run("sm80 int4", function, *arguments)


def check(rows, case):
    found = run(rows, cases.figures, case)
    cases.check_figures(found, case)
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("head_dim", "dtype", "causal"), [(128, "fp16", False), (64, "bf16", True)])
@pytest.mark.parametrize(("s", "sk"), [(1, 1), (1, 300), (63, 65), (65, 129), (300, 63), (300, 300)])
def test_lengths(rows, precision, s, sk, head_dim, dtype, causal):
    check(rows, Case(precision, s, sk, head_dim, dtype, causal, group=1 + s % 3))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [{"head_dim": 100}, {"head_dim": 20, "dtype": "bf16", "causal": True}], ids=str)
def test_head_dims(rows, precision, shape):
    check(rows, Case(precision, 130, 200, batch=2, heads_kv=2, **shape))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("memory", ["bshd", "strided_last"])
def test_memory(rows, precision, memory):
    check(rows, Case(precision, 129, 129, 64, "bf16", True, 2, 2, memory=memory))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("q_mean", "k_mean"), [(0, 8), (8, 0), (3, 8)])
def test_means_of_channels_cost_nothing(rows, precision, q_mean, k_mean):
    """They are taken off before quantization, and their products come back exactly."""
    plain = check(rows, Case(precision, 300, 300, q_mean=0, k_mean=0))
    moved = check(rows, Case(precision, 300, 300, q_mean=q_mean, k_mean=k_mean))
    assert moved["error"] <= 1.1 * plain["error"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_channel_outliers(rows, precision):
    """Where plain INT4 fails: without K's mean taken off, the cosine falls."""
    means = {"q_mean": 3.0, "k_mean": 8.0, "v_mean": 2.0}
    found = run(rows, cases.figures, Case(precision, 300, 300, **means))
    plain = run(rows, cases.figures, Case(precision, 300, 300, **means, smooth_k=False))
    assert found["cosine"] >= 0.995 > plain["cosine"], (found, plain)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_the_order_of_warps(rows, precision):
    first, *others = (run(rows, cases.bits, Case(precision, 200, 300, seed=seed)) for seed in range(3))
    assert all(other == first for other in others)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_key(rows, precision):
    out, _ = run(rows, cases.bits, Case(precision, 70, 0, 64, "bf16", causal=True))
    assert not any(out)


VARIANTS = [(64, "bf16", True), (128, "fp16", False)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("head_dim", "dtype", "causal"), VARIANTS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "place"), [("q", (0, 1, 64, 0)), ("k", (0, 0, 0, 3)), ("k", (0, 0, 70, 9)), ("v", (0, 0, 90, 9))]
)
def test_nonfinite(rows, precision, head_dim, dtype, causal, value, name, place):
    """As in exact attention: queries of a block share a mean, but no infinity and no NaN."""
    case = Case(precision, 140, 140, head_dim, dtype, causal)
    run(rows, cases.placement, case, name, [place], value)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [None, -0.125])
def test_infinities_in_k_meet_the_queries_own_values(rows, precision, scale):
    """Not what is left of them beside their block's mean, nor what INT4 makes of the small ones: their signs decide."""
    case = Case(precision, 300, 140, 64, "bf16", True, q_mean=1.0, scale=scale)
    for place in ((0, 0, 0, 3), (0, 0, 139, 63)):
        run(rows, cases.placement, case, "k", [place], math.inf)
