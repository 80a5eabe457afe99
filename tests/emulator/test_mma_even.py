# SPDX-License-Identifier: Apache-2.0
"""The mma family's int8_int8 at 128 channels, where blocks of V may be even: one factor for all of their channels."""

import dataclasses
import math

import pytest

from tests.emulator import cases
from tests.emulator.cases import Case

PLAIN = Case("int8_int8", 130, 300, 128, "fp16", v_mean=1.0, wide_blocks=0)
KINDS = pytest.mark.parametrize("kind", [PLAIN, dataclasses.replace(PLAIN, causal=True)], ids=["plain", "causal"])
ARCHES = pytest.mark.parametrize("arch", ["sm80", "sm86"])  # blocks of four and of eight warps


def run(rows, function, case, *arguments, arch="sm80"):
    return rows.run(arch, function, case, *arguments)


def check(rows, case, arch="sm80"):
    cases.check_figures(run(rows, cases.figures, case, arch=arch), case)


@KINDS
@ARCHES
@pytest.mark.parametrize("s_sk", [(1, 1), (1, 300), (63, 65), (65, 64), (128, 128), (130, 129), (300, 193)])
def test_lengths(rows, s_sk, arch, kind):
    check(rows, dataclasses.replace(kind, seqlen_q=s_sk[0], seqlen_k=s_sk[1]), arch)


@KINDS
def test_no_keys(rows, kind):
    out, _ = run(rows, cases.bits, dataclasses.replace(kind, seqlen_k=0))
    assert not any(out)


@KINDS
@ARCHES
@pytest.mark.parametrize("every", [64, 90, 128, 150, 192])
def test_blocks_that_are_not_even(rows, every, arch, kind):
    """In turn with even ones, of even and of odd numbers."""
    case = dataclasses.replace(kind, seqlen_q=200, seqlen_k=700, loud_v=every, v_mean=0.0)
    found = run(rows, cases.figures, case, arch=arch)
    assert found["finite"]
    assert found["near"] <= cases.NEAR[case.precision], found
    assert found["near_lse"] <= cases.near_lse_max(case), found


@KINDS
@ARCHES
def test_attention_sink(rows, arch, kind):
    """The first keys have most of the weight and little V, so their block is not even."""
    case = dataclasses.replace(kind, seqlen_q=200, seqlen_k=450, sink=True)
    found = run(rows, cases.figures, case, arch=arch)
    assert found["finite"]
    assert found["near"] <= cases.NEAR[case.precision], found


@KINDS
@pytest.mark.parametrize("keys", [16_500, 33_000])
def test_many_keys(rows, keys, kind):
    """Behind 256 blocks O loses what it has too much."""
    check(rows, dataclasses.replace(kind, seqlen_q=40, seqlen_k=keys, group=1, factor=0.5))


@KINDS
@pytest.mark.parametrize(("factor", "rise"), [(4.0, 1.0), (2.0, 6.0), (30.0, 1.0)])
def test_large_scores(rows, kind, factor, rise):
    """Maxima move while O has too much; later keys score more."""
    case = dataclasses.replace(kind, seqlen_q=200, seqlen_k=420, factor=factor, rise=rise, v_mean=0.0)
    cases.check_scores_of_any_size(run(rows, cases.figures, case), case)


@KINDS
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", cases.PLACES)
def test_nonfinite(rows, kind, value, name):
    case = dataclasses.replace(kind, seqlen_q=140, seqlen_k=140)
    for where in cases.PLACES[name]:
        run(rows, cases.placement, case, name, where, value)


@KINDS
def test_bits_do_not_depend_on_the_order_of_warps(rows, kind):
    case = dataclasses.replace(kind, seqlen_q=200, seqlen_k=450, loud_v=150)
    seeds = (dataclasses.replace(case, seed=seed) for seed in range(6))
    first, *others = (run(rows, cases.bits, each) for each in seeds)
    assert all(other == first for other in others)
