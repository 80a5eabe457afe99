# SPDX-License-Identifier: Apache-2.0
"""Views whose elements lie beyond 2**31 from their first: 32-bit offsets would corrupt them without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_oracle import exact
from gpu_kit import lse_error_max, relative_l1
from native_call import NativeCall

import sagert

HEADS, HEAD_DIM = 56, 128
LENGTH = 99_866  # the first at which a fused QKV view of these heads passes 2**31 elements


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_fused_qkv_past_two_to_the_31(causal: bool, served: list[str], device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    generator = torch.Generator(device=device).manual_seed(7)
    fused = torch.empty(1, LENGTH, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    fused.normal_(generator=generator)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    assert (LENGTH - 1) * q.stride(2) + q[0, :, 0].numel() > 2**31
    packed = [x.contiguous() for x in (q, k, v)]
    for precision in served:
        strided = sagert.attention(q, k, v, is_causal=causal, precision=precision)
        expected = sagert.attention(*packed, is_causal=causal, precision=precision)
        assert torch.equal(strided, expected), f"{precision}: a view past 2**31 elements gives other bits"
        assert torch.isfinite(strided).all()


def test_output_past_two_to_the_31(served: list[str], device: torch.device) -> None:
    if torch.cuda.mem_get_info(device)[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    generator = torch.Generator(device=device).manual_seed(8)
    q = torch.randn(1, HEADS, LENGTH, HEAD_DIM, dtype=torch.bfloat16, device=device, generator=generator)
    k, v = (torch.randn(1, HEADS, 300, HEAD_DIM, dtype=q.dtype, device=device, generator=generator) for _ in range(2))
    room = torch.full((1, LENGTH, 3, HEADS, HEAD_DIM), float("nan"), dtype=q.dtype, device=device)
    out = room[:, :, 1].transpose(1, 2)
    for precision in served:
        out.fill_(float("nan"))
        sagert.attention(q, k, v, precision=precision, out=out)
        assert torch.equal(out, sagert.attention(q, k, v, precision=precision))
    assert room[:, :, 0].isnan().all()
    assert room[:, :, 2].isnan().all()


def test_fused_qkv_past_two_to_the_31_on_every_row(here: list[Any], info: Any, device: torch.device) -> None:
    """Causal, on the rows that selection does not take for it; the contiguous result is the same row's."""
    if torch.cuda.mem_get_info(device)[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free GPU memory")
    generator = torch.Generator(device=device).manual_seed(9)
    fused = torch.empty(1, LENGTH, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    fused.normal_(generator=generator)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    packed = [x.contiguous() for x in (q, k, v)]
    for precision in dict.fromkeys(row.precision for row in here):
        told = sagert.explain(q, k, v, is_causal=True, precision=precision, device=info)
        others = [row.id for row in here if row.precision == precision and told.reasons.get(row.id) == ()]
        for row in set(others) - {told.row}:
            results = [torch.full_like(packed[0], float("nan")) for _ in range(2)]
            for tensors, out in zip(((q, k, v), packed), results, strict=True):
                NativeCall(*tensors, out, precision=precision, causal=True, row=row).run()
            assert torch.isfinite(results[0]).all(), row
            assert torch.equal(*results), f"{row}: a view past 2**31 elements gives other bits"


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=["bool", "bf16"])
def test_mask_past_two_to_the_32(dtype: torch.dtype, here: list[Any], device: torch.device) -> None:
    """A mask of more than 2**32 elements: sampled queries against float64, the last ones among them."""
    precisions = list(dict.fromkeys(row.precision for row in here if "mask" in row.flags))
    if not precisions:
        pytest.skip("no row of this device serves masks")
    if torch.cuda.mem_get_info(device)[0] < 48 << 30:
        pytest.skip("needs 48 GiB of free GPU memory")
    length = 66_000
    assert length**2 > 2**32
    generator = torch.Generator(device=device).manual_seed(10)
    q, k, v = (torch.randn(1, 2, length, 64, generator=generator, device=device).to(torch.bfloat16) for _ in range(3))
    mask = torch.randint(0, 2, (length, length), generator=generator, device=device, dtype=torch.uint8).view(torch.bool)
    if dtype != torch.bool:
        mask = _additive(mask, dtype)
    rows = torch.cat((torch.arange(64), torch.randint(length, (64,)), torch.arange(length - 64, length))).to(device)
    want, want_lse = exact(q, k, v, mask=mask, rows=rows)
    for precision in precisions:
        out, lse = sagert.attention(q, k, v, mask, precision=precision, return_lse=True)
        row = sagert.explain(q, k, v, mask, precision=precision, return_lse=True).row
        tolerance = next(r.relative_l1 for r in here if r.id == row)
        error = relative_l1(out[:, :, rows], want)
        assert error <= 1.3 * tolerance, f"{row}: relative L1 {error:.5f}"
        assert float((lse[:, :, rows].double() - want_lse).abs().max()) <= lse_error_max(precision), row


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0.5 where a bool mask attends, -inf elsewhere, without a float32 tensor of its size."""
    return torch.full(mask.shape, 0.5, dtype=dtype, device=mask.device).masked_fill_(~mask, -float("inf"))
