# SPDX-License-Identifier: Apache-2.0
"""Views whose elements lie beyond 2**31 from their first: 32-bit offsets would corrupt them without a word."""

from __future__ import annotations

import pytest
import torch

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
