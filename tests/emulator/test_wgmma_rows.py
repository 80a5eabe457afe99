# SPDX-License-Identifier: Apache-2.0
"""The wgmma family's kernels through the C ABI, without a GPU: against the reference and against float64 attention."""

import itertools

import pytest

from tests.emulator import cases
from tests.emulator.cases import Case
from tests.gpu import gpu_kit

PRECISIONS = ("int8_fp16", "int8_fp8", "int8_int8")


@pytest.mark.parametrize(("head_dim", "dtype", "causal"), [(128, "fp16", False), (64, "bf16", True)])
@pytest.mark.parametrize(
    ("precision", "lengths"), list(itertools.product(PRECISIONS, [(1, 1), (65, 129), (300, 300)])), ids=str
)
def test_lengths(rows, precision, lengths, head_dim, dtype, causal):
    case = Case(precision, *lengths, head_dim, dtype, causal, family="wgmma")
    found = rows.run("sm90", cases.figures, case)
    assert found["finite"], "outputs left unwritten or not finite"
    assert found["near"] <= cases.NEAR[precision], found
    assert found["error"] <= gpu_kit.allowed(cases.ACCURACY[precision], int(found["outputs"])), found
    assert found["lse_error"] <= gpu_kit.lse_error_max(precision), found


@pytest.mark.parametrize("rise", [1.0, 6.0])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_bounds_of_scores(rows, factor, rise):
    """A bound stands in for row maxima, or is too large for that; keys that come later score more."""
    case = Case("int8_fp16", 130, 200, 64, "bf16", True, factor=factor, rise=rise, family="wgmma")
    cases.check_scores_of_any_size(rows.run("sm90", cases.figures, case), case)
