# SPDX-License-Identifier: Apache-2.0
"""Few queries and many keys: rows that split the keys of small grids join the parts to what exact attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_kit import (
    MEMORY,
    Case,
    check_errors,
    check_placement,
    errors,
    exact,
    lse_error_max,
    poisoned_attention,
    randn,
    relative_l1,
    serving_row,
)

import sagert

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float16, torch.bfloat16)
# Between split and whole keys only the unit of P and the order of sums differ: the rounding of P, in 8 bits, twice.
AGAINST_WHOLE = {"int8_fp16": 0.006}
WHOLE_HEADS = 136  # so many that nothing is split


def case_of(index: int, seqlen_q: int, seqlen_k: int, causal: bool) -> Case:
    """Heads, groups, head dims, dtypes and layouts by turns."""
    heads_kv, group = ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4))[index % 5]
    memory = MEMORY[index % len(MEMORY)]
    head_dim = (64, 128, 128, 40, 64, 104)[index % 6]
    if memory == "fused_qkv":  # has one length
        memory = "bshd"
    return Case(index, 1, heads_kv, group, seqlen_q, seqlen_k, head_dim, causal, DTYPES[index // 2 % 2], memory)


LENGTHS = [(q, k, False) for k in (1000, 8192, 65536) for q in (1, 17, 64, 128, 300)]
LENGTHS += [(q, k, True) for q, k in ((1, 8192), (128, 8192), (300, 8192), (1000, 1000), (2048, 65536), (4096, 1000))]
CASES = [case_of(2 * i + j, *lengths) for i, lengths in enumerate(LENGTHS) for j in range(2)]


@pytest.fixture(autouse=True)
def _room() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_grid(
    case: Case, served: list[str], tolerance: dict[str, float], device: torch.device, record: Any
) -> None:
    q, k, v = randn(case, device)
    want, want_lse = exact(q, k, v, case.causal)
    for precision in served:
        # What the parts' memory held before must not matter.
        dirt = torch.full((16 << 20,), NAN, device=device)
        del dirt
        out, lse = poisoned_attention(case, q, k, v, precision)
        point = errors(case, out, lse, want, want_lse)
        record.add("small_grids", precision, **point)
        check_errors(point, precision, tolerance[precision])
        for _ in range(3):
            again, lse_again = poisoned_attention(case, q, k, v, precision)
            assert torch.equal(out, again), f"{precision}, {case}: other bits"
            assert torch.equal(lse, lse_again), f"{precision}, {case}: other LSE bits"
        bare = sagert.attention(
            q, k, v, is_causal=case.causal, enable_gqa=case.group > 1, precision=precision, return_lse=False
        )
        assert torch.equal(out, bare), f"{precision}, {case}: other bits without LSE"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_parts_agree_with_the_whole(
    head_dim: int, dtype: torch.dtype, causal: bool, served: list[str], device: torch.device
) -> None:
    """The same head alone, and as one of so many that the grid is large."""
    case = Case(1, 1, 1, 1, 1500, 5000, head_dim, causal, dtype, "bhsd")
    q, k, v = randn(case, device)
    many = [t.expand(1, WHOLE_HEADS, *t.shape[2:]) for t in (q, k, v)]
    for precision in served:
        part, part_lse = sagert.attention(q, k, v, is_causal=causal, precision=precision, return_lse=True)
        whole, whole_lse = sagert.attention(*many, is_causal=causal, precision=precision, return_lse=True)
        near = relative_l1(part, whole[:, :1])
        assert near <= AGAINST_WHOLE.get(precision, 0.045), f"{precision}: relative L1 {near:.5f} against whole keys"
        assert float((part_lse - whole_lse[:, :1]).abs().max()) <= 0.01, precision


PLACES = [
    ("q", [(0, 1, 40, 3)], NAN),
    ("q", [(0, 1, 40, 3)], INF),
    ("k", [(0, 0, 70, 5)], NAN),
    ("k", [(0, 0, 1150, 5)], INF),
    ("k", [(0, 0, 70, 5), (0, 1, 600, 5)], -INF),
    ("v", [(0, 0, 70, 5)], NAN),
    ("v", [(0, 0, 70, 5)], INF),
    ("v", [(0, 0, 1150, 5)], -INF),
    ("v", [(0, 0, 0, 0), (0, 1, 1199, 63)], INF),
    ("v", [(0, 0, 1130, 7), (0, 0, 5, 7)], NAN),
    ("v", [(0, 0, 3, 9), (0, 0, 640, 9), (0, 0, 1100, 9)], INF),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(("name", "where", "value"), PLACES, ids=lambda x: str(x).replace(" ", ""))
def test_placement(
    name: str,
    where: list[tuple[int, ...]],
    value: float,
    dtype: torch.dtype,
    causal: bool,
    served: list[str],
    tolerance: dict[str, float],
    device: torch.device,
) -> None:
    """NaN and Inf appear exactly where exact attention has them, whichever part they lie in."""
    check_placement(1200, name, where, value, dtype, causal, served, tolerance, device)


@pytest.mark.parametrize("first", [0, 1400], ids=["first-keys", "last-keys"])
def test_part_without_weight(first: int, served: list[str], tolerance: dict[str, float], device: torch.device) -> None:
    """Keys whose scores are all -inf, a whole part of them and more, add nothing."""
    case = Case(3, 1, 1, 1, 100, 2048, 64, False, torch.bfloat16, "bhsd")
    q, k, v = randn(case, device)
    q[..., 9] = q[..., 9].abs() + 0.5
    k[:, :, first : first + 648, 9] = -INF
    want, want_lse = exact(q, k, v)
    for precision in served:
        if "q_smooth" in serving_row(q, k, v, False, precision).quant:
            continue  # what all queries share of channel 9 is taken off, and the sign with it (docs/numerics.md)
        out, lse = sagert.attention(q, k, v, precision=precision, return_lse=True)
        assert torch.isfinite(out).all(), precision
        assert relative_l1(out, want) <= 1.5 * tolerance[precision], precision
        assert float((lse.double() - want_lse).abs().max()) <= lse_error_max(precision), precision
