# SPDX-License-Identifier: Apache-2.0
"""The mma family's kernels through the C ABI, without a GPU: against the reference and against float64 attention."""

import itertools
import math

import pytest

from tests.emulator import cases
from tests.emulator.cases import Case
from tests.gpu import gpu_kit

PRECISIONS = ("int8_fp16", "int8_int8")
LENGTHS = (1, 63, 65, 129, 300)


def check(rows, case, arch="sm80"):
    cases.check_figures(rows.run(arch, cases.figures, case), case)


def variants():
    """Every pair of lengths, in turn with and without a mask, in either dtype."""
    for i, (precision, s, sk) in enumerate(itertools.product(PRECISIONS, LENGTHS, LENGTHS)):
        head_dim, dtype = ((128, "fp16"), (64, "bf16"))[i // 2 % 2]
        yield Case(precision, s, sk, head_dim, dtype, causal=bool(i % 2), group=1 + i % 3)


@pytest.mark.parametrize("case", list(variants()), ids=str)
def test_lengths(rows, case):
    check(rows, case)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 40, "dtype": "bf16", "causal": True},
        {"head_dim": 100, "batch": 2, "heads_kv": 2, "group": 1},
        {"head_dim": 127, "causal": True},
        {"head_dim": 1, "dtype": "bf16"},
        {"head_dim": 20, "dtype": "bf16", "group": 8},
        {"smooth_k": False, "batch": 2},
        {"k_mean": 3.0, "v_mean": 2.0, "causal": True},
        {"k_mean": 3.0, "v_mean": 2.0, "dtype": "bf16", "head_dim": 64},
    ],
    ids=str,
)
def test_shapes(rows, precision, shape):
    check(rows, Case(precision, 130, 200, **shape))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "causal"), [(80, "bf16", 0), (96, "bf16", 0), (200, "fp16", 1), (256, "fp16", 1)]
)
def test_head_dims_between_and_beyond(rows, precision, head_dim, dtype, causal):
    check(rows, Case(precision, 130, 200, head_dim, dtype, bool(causal), batch=2))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("memory", [memory for memory in gpu_kit.MEMORY if memory != "bhsd"])
def test_memory(rows, precision, causal, memory):
    check(rows, Case(precision, 129, 129, 64, "bf16", causal, 2, 2, memory=memory))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_no_key(rows, precision, causal):
    out, lse = rows.run("sm80", cases.bits, Case(precision, 70, 0, 128, "fp16", causal))
    assert not any(out)
    assert set(lse) == {0xFF800000 - (1 << 32)}  # -inf


@pytest.mark.parametrize(
    "case",
    [Case(p, 200, 300, 128, "fp16", c) for p in PRECISIONS for c in (False, True)]
    + [Case("int8_int8", 200, 300, dim, "bf16", c) for dim, c in ((64, False), (64, True), (96, False))],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_warps(rows, case):
    """A missing barrier, or a missing wait for a copy, makes the result a matter of luck."""
    first, *others = (rows.run("sm80", cases.bits, Case(**{**vars(case), "seed": seed})) for seed in (0, 1, 2, 3))
    assert all(other == first for other in others)


@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (64, True), (96, False)])
@pytest.mark.parametrize("sk", [64, 128, 192, 256, 320, 321])
def test_numbers_of_blocks(rows, sk, head_dim, causal):
    """Two blocks of keys are a step, which may lack the second one."""
    check(rows, Case("int8_int8", 130, sk, head_dim, "bf16", causal, k_mean=2.0, v_mean=1.0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", cases.PLACES)
def test_nonfinite(rows, precision, causal, value, name):
    for where in cases.PLACES[name]:
        rows.run("sm80", cases.placement, Case(precision, 140, 140, 64, "bf16", causal), name, where, value)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [4, 64])
def test_large_scores(rows, precision, dtype, causal, head_dim):
    """Where a unit of the integer scores is many powers of two: results stay finite, and those of the reference."""
    kernel_dim = 128 if dtype == "fp16" else 64
    case = Case(
        precision,
        129,
        200,
        min(head_dim + 60 * (dtype == "fp16" and head_dim == 64), kernel_dim),
        dtype,
        causal,
        factor=30.0,
        wide_blocks=0 if dtype == "fp16" else 96,  # of fp16 there is the kernel for 128 channels alone
    )
    found = rows.run("sm80", cases.figures, case)
    assert found["finite"], found
    assert found["near"] <= 2 * cases.NEAR[precision], found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rise", [1.0, 6.0])
@pytest.mark.parametrize("factor", [0.01, 2.0, 2.4, 4.0])
def test_bounds_of_scores(rows, factor, rise, causal):
    """A bound stands in for row maxima, or is too large for that; keys that come later score more."""
    case = Case("int8_fp16", 130, 200, 64, "bf16", causal, factor=factor, rise=rise)
    cases.check_scores_of_any_size(rows.run("sm80", cases.figures, case), case)


HALF_SUMS = {"int8_fp16": "sm86", "int8_fp8": "sm89"}  # whose row sums in fp16


@pytest.mark.parametrize("precision", HALF_SUMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "sk"), [(1, 300), (65, 63), (65, 129), (300, 300)])
def test_sums_in_fp16(rows, precision, s, sk, causal):
    """Rows of GPUs whose fp16 sums are quicker than fp32 ones."""
    check(rows, Case(precision, s, sk, 128, "fp16", causal, half_sums=True), HALF_SUMS[precision])


@pytest.mark.parametrize("precision", HALF_SUMS)
def test_sums_in_fp16_stay_finite(rows, precision):
    """Whatever V is: its scale and P's bound keep 64 products within fp16."""
    check(rows, Case(precision, 65, 300, 128, "fp16", v_mean=9000.0, factor=0.01, half_sums=True), HALF_SUMS[precision])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "sk"), [(1, 300), (65, 63), (130, 129), (300, 300)])
def test_wide_blocks_of_wide_rows(rows, s, sk, causal):
    """Two blocks of keys are a step at head dim 128, too, where a warp has 16 queries."""
    check(rows, Case("int8_int8", s, sk, 128, "fp16", causal, v_mean=1.0, wide_blocks=128), "sm120")
