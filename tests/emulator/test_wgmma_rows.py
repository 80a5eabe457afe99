# SPDX-License-Identifier: Apache-2.0
"""The wgmma family's kernels through the C ABI, without a GPU: against the reference and against float64 attention."""

import dataclasses
import itertools
import math

import pytest

from tests.emulator import cases
from tests.emulator.cases import Case

PRECISIONS = ("int8_fp16", "int8_fp8", "int8_int8")


@pytest.mark.parametrize(("head_dim", "dtype", "causal"), [(128, "fp16", False), (64, "bf16", True)])
@pytest.mark.parametrize(
    ("precision", "lengths"), list(itertools.product(PRECISIONS, [(1, 1), (65, 129), (300, 300)])), ids=str
)
@pytest.mark.parametrize("lse", [True, False])
def test_lengths(rows, precision, lengths, head_dim, dtype, causal, lse):
    check(rows, Case(precision, *lengths, head_dim, dtype, causal, family="wgmma", lse=lse))


def check(rows, case, near=None, **device):
    cases.check_figures(rows.run("sm90", cases.figures, case, **device), case, near)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("head_dim", "dtype", "causal"), [(128, "fp16", False), (64, "bf16", True)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", cases.PLACES)
def test_nonfinite(rows, precision, head_dim, dtype, causal, value, name):
    case = Case(precision, 140, 140, head_dim, dtype, causal, family="wgmma")
    for where in cases.PLACES[name]:
        rows.run("sm90", cases.placement, case, name, where, value)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_from_a_counter(rows, precision):
    """More tiles than thread blocks, long and short ones: who is done takes the next."""
    check(rows, Case(precision, 193, 70, 64, "bf16", True, heads_kv=35, family="wgmma"))


@pytest.mark.parametrize("every", [128, 150, 256])
@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "causal"),
    [("sm90", 128, "fp16", False), ("sm90 causal", 128, "bf16", True), ("sm90", 64, "bf16", True)],
)
@pytest.mark.parametrize("lse", [True, False])
def test_blocks_of_v_that_are_not_even(rows, every, device, head_dim, dtype, causal, lse):
    """In turn with even ones, of even and of odd numbers: some channels do not share scales there."""
    case = Case("int8_int8", 200, 700, head_dim, dtype, causal, loud_v=every, v_mean=0.0, family="wgmma", lse=lse)
    found = rows.run(device, cases.figures, case)
    assert found["finite"]
    assert found["near"] <= cases.NEAR["int8_int8"], found
    assert found["near_lse"] <= cases.near_lse_max(case), found


@pytest.mark.parametrize("rise", [0.05, 20.0])
@pytest.mark.parametrize(("head_dim", "dtype", "causal"), [(128, "fp16", False), (64, "bf16", True)])
def test_maxima_that_move(rows, rise, head_dim, dtype, causal):
    """Blocks whose maxima are far above or far below those before: O and the sums refer to another one, or do not."""
    case = Case("int8_int8", 130, 900, head_dim, dtype, causal, family="wgmma", factor=4.0, rise=rise)
    found = rows.run("sm90", cases.figures, case)
    assert found["finite"]
    assert found["near"] <= 2 * cases.NEAR["int8_int8"], found


@pytest.mark.parametrize("lengths", [(3, 3), (70, 131), (200, 1300)])
@pytest.mark.parametrize(("head_dim", "dtype", "causal"), [(128, "fp16", False), (64, "bf16", True)])
@pytest.mark.parametrize("precision", ["int8_int8", "int8_fp8"])
def test_attention_sink(rows, precision, head_dim, dtype, causal, lengths):
    """Keys that have most of the weight and a small V take nothing from the others of their block."""
    check(rows, Case(precision, *lengths, head_dim, dtype, causal, v_mean=0.3, sink=True, family="wgmma"))


@pytest.mark.parametrize(
    "case",
    [
        Case("int8_fp8", 400, 8400, 128, "fp16", factor=0.5, family="wgmma"),
        Case("int8_fp8", 400, 8400, 128, "fp16", factor=0.5, family="wgmma", lse=False),
        Case("int8_fp8", 9000, 9000, 64, "bf16", True, factor=0.5, group=1, family="wgmma"),
    ],
    ids=["many_keys", "many_keys without LSE", "causal"],
)
def test_settled_sums(rows, case):
    """More than 64 blocks of keys settle twice; the settled sums lie where the next tile's queries are to go."""
    check(rows, case, multiprocessors=2)


AGAIN = Case("int8_fp8", 320, 2100, 128, "fp16", factor=0.2, late_v=True, family="wgmma")


@pytest.mark.parametrize("lse", [True, False])
def test_tiles_again(rows, lse):
    """Tiles whose sums in fp16 overflow, computed again when a thread block's others are done."""
    check(rows, dataclasses.replace(AGAIN, lse=lse), multiprocessors=2)


# Tiles of at most 64 queries, whose keys all warpgroups share.
JOINT = Case("int8_fp8", 200, 1700, 128, "fp16", family="wgmma")


@pytest.mark.parametrize(
    ("case", "multiprocessors"),
    [
        (JOINT, 1),
        (dataclasses.replace(JOINT, lse=False), 1),
        (dataclasses.replace(JOINT, seqlen_q=64, seqlen_k=1536), 1),
        (dataclasses.replace(JOINT, seqlen_q=1541, seqlen_k=1541, head_dim=64, dtype="bf16", causal=True, group=1), 2),
        (dataclasses.replace(JOINT, seqlen_q=1, seqlen_k=13000, factor=0.5), 1),
        (dataclasses.replace(JOINT, seqlen_q=20, seqlen_k=4100, heads_kv=1, group=1), 2),
        (dataclasses.replace(JOINT, seqlen_k=2100, factor=0.2, late_v=True), 1),
    ],
    ids=["rest", "without LSE", "alone", "causal", "settled", "parts", "again"],
)
def test_joint_tiles(rows, case, multiprocessors):
    check(rows, case, cases.NEAR_JOINT, multiprocessors=multiprocessors)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", cases.PLACES)
def test_nonfinite_in_joint_tiles(rows, value, name):
    case = dataclasses.replace(JOINT, seqlen_q=30, seqlen_k=1600)
    rows.run("sm90", cases.placement, case, name, cases.PLACES[name][0], value)


@pytest.mark.parametrize(
    "case",
    [
        *(
            dataclasses.replace(case, lse=lse)
            for case in (AGAIN, dataclasses.replace(JOINT, heads_kv=2))
            for lse in (True, False)
        ),
        *(Case(p, 400, 300, 128, "fp16", family="wgmma") for p in PRECISIONS),
    ]
    + [Case(p, 400, 400, 64, "bf16", True, family="wgmma", lse=lse) for p in PRECISIONS for lse in (True, False)],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_warps(rows, case):
    """Several tiles per thread block, joint ones in front of others: a missing barrier or wait makes the result a
    matter of luck, or a deadlock."""
    seeds = (dataclasses.replace(case, seed=seed) for seed in range(6))
    first, *others = (rows.run("sm90", cases.bits, each, multiprocessors=2) for each in seeds)
    assert all(other == first for other in others)


@pytest.mark.parametrize("length", [1100, 1600])
def test_mean_of_a_sample(rows, length):
    """From 1024 keys on K's mean is that of some of them, and the LSE gets it back."""
    check(rows, Case("int8_fp8", 70, length, 64, "bf16", True, k_mean=6.0, family="wgmma"))


@pytest.mark.parametrize("rise", [1.0, 6.0])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_bounds_of_scores(rows, factor, rise):
    """A bound stands in for row maxima, or is too large for that; keys that come later score more."""
    case = Case("int8_fp16", 130, 200, 64, "bf16", True, factor=factor, rise=rise, family="wgmma")
    cases.check_scores_of_any_size(rows.run("sm90", cases.figures, case), case)
