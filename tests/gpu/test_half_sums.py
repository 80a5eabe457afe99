# SPDX-License-Identifier: Apache-2.0
"""P V summed in fp16 (kernels/sm90/half_sums.cuh): flat attention over many keys, and sums that leave fp16's range."""

from __future__ import annotations

import pytest
import torch
from gpu_kit import relative_l1
from value_kinds import KINDS, make_kind

import sagert
from sagert.exact import exact_attention

KEYS = 20_000


def values(kind: str, head_dim: int, device: torch.device) -> torch.Tensor:
    v = torch.randn(1, 2, KEYS, head_dim, device=device, generator=torch.Generator(device).manual_seed(3))
    return make_kind(kind, v).to(torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flat_attention(kind: str, causal: bool, head_dim: int, served: list[str], device: torch.device) -> None:
    v = values(kind, head_dim, device)
    q = torch.zeros(1, 2, KEYS if causal else 200, head_dim, device=device, dtype=torch.bfloat16)
    k = torch.randn(1, 2, KEYS, head_dim, device=device, dtype=torch.bfloat16)
    want = v.double().mean(2, keepdim=True)  # all weights are equal
    if causal:
        want = (v.double().cumsum(2) / torch.arange(1, KEYS + 1, device=device)[:, None])[:, :, -200:]
    for precision in served:
        out = sagert.attention(q, k, v, is_causal=causal, precision=precision)
        assert bool(out.isfinite().all()), precision
        error = (out[:, :, -200:].double() - want).abs().max()
        assert error <= 4e-3 * v.abs().max(), f"{precision}: {error:.5f}"


@pytest.mark.parametrize("heads", [(2, 1), (140, 35)], ids=["few", "many"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_some_tiles_overflow(
    head_dim: int, causal: bool, heads: tuple[int, int], served: list[str], device: torch.device
) -> None:
    """Every other head overflows in every third channel: no more error than elsewhere, the same bits twice."""
    if "int8_fp8" not in served:
        pytest.skip("int8_fp8 is not served here")
    generator = torch.Generator(device).manual_seed(head_dim)
    q, k, v = (
        torch.randn(1, n, 1000, head_dim, device=device, generator=generator, dtype=torch.float32)
        for n in (heads[0], heads[1], heads[1])
    )
    q[:, 1::2] *= 0.01
    v[..., ::3] *= 0.02
    v[:, :, -100:, ::3] += 1.0
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    out, lse = sagert.attention(q, k, v, is_causal=causal, precision="int8_fp8", enable_gqa=True, return_lse=True)
    plain = sagert.attention(q, k, v, is_causal=causal, precision="int8_fp8", enable_gqa=True)
    assert torch.equal(out, plain)
    whole = [x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v)]
    want, want_lse = exact_attention(q, *whole, is_causal=causal)
    assert bool(out.isfinite().all())
    for turn in (0, 1):
        assert relative_l1(out[:, turn::2], want[:, turn::2]) <= 0.045
    assert float((lse - want_lse).abs().max()) <= 0.06
