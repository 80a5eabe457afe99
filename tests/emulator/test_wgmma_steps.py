# SPDX-License-Identifier: Apache-2.0
"""The wgmma family's int8_fp8 row for long sequences at 64 channels: three blocks of keys are two of its steps."""

import dataclasses
import math

import pytest

from sagert.exponential import HALVING_STEP
from tests.emulator import cases
from tests.emulator.cases import Case

PLAIN = Case("int8_fp8", 200, 700, 64, "fp16", family="wgmma", step=HALVING_STEP)
CAUSAL = dataclasses.replace(PLAIN, seqlen_q=400, seqlen_k=400, dtype="bf16", causal=True)
KINDS = pytest.mark.parametrize(
    "kind",
    [PLAIN, CAUSAL, *(dataclasses.replace(case, lse=False) for case in (PLAIN, CAUSAL))],
    ids=["plain", "causal", "plain without LSE", "causal without LSE"],
)


def run(rows, function, case, *arguments, **device):
    return rows.run("sm90 long", function, case, *arguments, **device)


def check(rows, case, near=None, **device):
    cases.check_figures(run(rows, cases.figures, case, **device), case, near)


@KINDS
@pytest.mark.parametrize("keys", [1, 64, 128, 129, 191, 192, 193, 256, 257, 320, 384, 385, 448, 576, 641])
def test_numbers_of_keys(rows, keys, kind):
    """The last step may lack its whole block, its half, or some of the keys of either."""
    check(rows, dataclasses.replace(kind, seqlen_q=130, seqlen_k=keys, k_mean=2.0, v_mean=1.0))


@pytest.mark.parametrize(("s", "sk"), [(1, 300), (193, 193), (300, 1100), (577, 577), (600, 100)])
def test_diagonals(rows, s, sk):
    """Some of a tile's warpgroups end in a step before the tile's last one."""
    check(rows, dataclasses.replace(CAUSAL, seqlen_q=s, seqlen_k=sk))


@KINDS
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", [0, 127, 128, 191, 192, 255, 256, 383, 384, 399])
def test_keys_that_are_not_finite(rows, kind, value, key):
    case = dataclasses.replace(kind, seqlen_q=400, seqlen_k=400)
    for name in "kv":
        run(rows, cases.placement, case, name, [(0, 0, key, 9)], value)


@pytest.mark.parametrize(
    "case",
    [dataclasses.replace(PLAIN, seqlen_k=8400, lse=False), dataclasses.replace(CAUSAL, seqlen_q=5000, group=1)],
    ids=["many_keys", "causal"],
)
def test_settled_sums(rows, case):
    """More than 24 steps settle; the settled sums lie where the next tile's queries are to go."""
    case = dataclasses.replace(case, factor=0.5, seqlen_k=max(case.seqlen_q, case.seqlen_k))
    check(rows, case, multiprocessors=2)


@pytest.mark.parametrize(
    ("case", "multiprocessors"),
    [
        (dataclasses.replace(PLAIN, seqlen_k=1700, lse=False), 1),
        (dataclasses.replace(PLAIN, seqlen_q=64, seqlen_k=1536), 1),
        (dataclasses.replace(CAUSAL, seqlen_q=1541, seqlen_k=1541, group=1), 2),
        (dataclasses.replace(PLAIN, seqlen_q=20, seqlen_k=4100, group=1), 2),
        (dataclasses.replace(PLAIN, seqlen_q=320, seqlen_k=2100, factor=0.2, late_v=True, lse=False), 2),
    ],
    ids=["joint", "alone", "causal", "parts", "again"],
)
def test_joint_tiles_parts_and_tiles_again(rows, case, multiprocessors):
    check(rows, case, cases.NEAR_JOINT, multiprocessors=multiprocessors)


@KINDS
@pytest.mark.parametrize(("factor", "rise"), [(4.0, 1.0), (2.0, 6.0)])
def test_large_scores(rows, kind, factor, rise):
    case = dataclasses.replace(kind, factor=factor, rise=rise)
    cases.check_scores_of_any_size(run(rows, cases.figures, case), case)


@KINDS
def test_attention_sink(rows, kind):
    check(rows, dataclasses.replace(kind, v_mean=0.3, sink=True))


@KINDS
def test_bits_do_not_depend_on_the_order_of_warps(rows, kind):
    case = dataclasses.replace(kind, heads_kv=2)
    seeds = (dataclasses.replace(case, seed=seed) for seed in range(6))
    first, *others = (run(rows, cases.bits, each, multiprocessors=2) for each in seeds)
    assert all(other == first for other in others)
