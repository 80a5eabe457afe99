# SPDX-License-Identifier: Apache-2.0
"""Every precision of this device over generated shapes, dtypes, masks and memory layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_kit import (
    MEMORY,
    Case,
    arithmetic,
    cases,
    check_errors,
    errors,
    exact,
    lse_error_max,
    place,
    poisoned_attention,
    randn,
    relative_l1,
    serving_row,
)

import sagert
from sagert import reference

# Against the reference only the order of sums and the last bit of exp2 differ; a flipped rounding of P or of the
# output stays well below the quantization error itself.
AGAINST_REFERENCE = {
    "int8_fp16": 0.006, "int8_fp8": 0.02, "int8_int8": 0.01, "int4_fp16": 0.01, "int4_fp8": 0.02, "int4_int8": 0.01,
}  # fmt: skip


def is_split(case: Case, device: torch.device) -> bool:
    """Whether a family that splits the keys of small grids may do so here: 128 queries and 4 x 128 keys at least."""
    tiles = case.batch * case.heads * -(-case.seqlen_q // 128)
    return 2 * tiles <= torch.cuda.get_device_properties(device).multi_processor_count and case.seqlen_k > 7 * 128


def reference_output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, precision: str) -> torch.Tensor:
    options = arithmetic(serving_row(q, k, v, causal, precision), q.shape[3])
    return reference.attention(q, k, v, is_causal=causal, precision=precision, **options)[0]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_generated_shape(
    case: Case, served: list[str], tolerance: dict[str, float], device: torch.device, record: Any
) -> None:
    q, k, v = randn(case, device)
    want, want_lse = exact(q, k, v, case.causal)
    for precision in served:
        out, lse = poisoned_attention(case, q, k, v, precision)
        point = errors(case, out, lse, want, want_lse)
        near = relative_l1(out, reference_output(q, k, v, case.causal, precision))
        record.add("shapes", precision, **point, against_reference=near)
        check_errors(point, precision, tolerance[precision])
        bound = AGAINST_REFERENCE[precision] * (1 if case.outputs >= 4096 else 3)
        if is_split(case, device):  # each part rounds P beside a maximum of its own
            bound = max(bound, tolerance[precision])
        assert near <= bound, f"{precision}, {case}: relative L1 {near:.5f} against the reference"


@pytest.mark.parametrize("memory", MEMORY)
def test_layout_does_not_change_the_bits(memory: str, served: list[str], device: torch.device) -> None:
    case = Case(0, 2, 2, 1, 200, 200, 64, True, torch.float16, "bhsd")
    q, k, v = randn(case, device)
    placed = [place(t, memory, float("nan"))[0] for t in (q, k, v)]
    for precision in served:
        want = sagert.attention(q, k, v, is_causal=True, precision=precision)
        got = sagert.attention(*placed, is_causal=True, precision=precision)
        assert torch.equal(want, got), f"{precision}, {memory}"


def test_bshd_argument(served: list[str], device: torch.device) -> None:
    case = Case(1, 2, 2, 4, 129, 65, 72, False, torch.bfloat16, "bhsd")
    q, k, v = randn(case, device)
    swapped = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    for precision in served:
        want, want_lse = sagert.attention(q, k, v, enable_gqa=True, precision=precision, return_lse=True)
        got, got_lse = sagert.attention(*swapped, enable_gqa=True, precision=precision, layout="BSHD", return_lse=True)
        assert torch.equal(got.transpose(1, 2), want), precision
        assert torch.equal(got_lse, want_lse), precision


def test_empty_keys(served: list[str], device: torch.device) -> None:
    q = torch.randn(2, 4, 33, 64, device=device, dtype=torch.float16)
    k = torch.empty(2, 4, 0, 64, device=device, dtype=torch.float16)
    for precision in served:
        out = torch.full_like(q, float("nan"))
        _, lse = sagert.attention(q, k, k, precision=precision, return_lse=True, out=out)
        assert torch.equal(out, torch.zeros_like(out)), precision
        assert torch.isneginf(lse).all(), precision


def test_scale_and_smoothing(served: list[str], tolerance: dict[str, float], device: torch.device) -> None:
    case = Case(2, 1, 4, 1, 512, 512, 128, False, torch.bfloat16, "bhsd")
    q, k, v = randn(case, device)
    want, want_lse = exact(q, k, v, scale=0.05)
    shifted = k + 20 * torch.randn(1, 4, 1, 128, device=device, dtype=k.dtype)
    want_shifted = exact(q, shifted, v)[0]
    for precision in served:
        got, lse = sagert.attention(q, k, v, scale=0.05, precision=precision, return_lse=True)
        assert relative_l1(got, want) <= 1.3 * tolerance[precision], precision
        assert float((lse.double() - want_lse).abs().max()) <= lse_error_max(precision), precision
        rough = sagert.attention(q, shifted, v, precision=precision, smooth_k=False)
        smooth = sagert.attention(q, shifted, v, precision=precision)
        assert relative_l1(smooth, want_shifted) <= 1.3 * tolerance[precision], precision
        assert relative_l1(smooth, want_shifted) < relative_l1(rough, want_shifted), precision


def test_heads_beyond_what_l2_holds(
    served: list[str], tolerance: dict[str, float], device: torch.device, record: Any
) -> None:
    """Causal tiles are ordered among heads whose keys stay in L2 together; what is left of the heads comes first."""
    case = Case(0, 1, 41, 1, 4096, 4096, 128, True, torch.bfloat16, "bhsd")
    q, k, v = randn(case, device)
    heads = [0, 8, 16, 17, 24, 25, 40]  # ends of sections, for most sizes of L2
    want, want_lse = exact(q[:, heads], k[:, heads], v[:, heads], True)
    for precision in served:
        out, lse = poisoned_attention(case, q, k, v, precision)
        point = errors(case, out[:, heads], lse[:, heads], want, want_lse)
        record.add("shapes", precision, **point)
        check_errors(point, precision, tolerance[precision])
