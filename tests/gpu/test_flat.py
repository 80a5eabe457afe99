# SPDX-License-Identifier: Apache-2.0
"""Flat attention over many keys: sums of P and of P V as large as they get, V coherent, biased or with outliers."""

from __future__ import annotations

import pytest
import torch

import sagert

KEYS = 20_000


def values(kind: str, head_dim: int, device: torch.device) -> torch.Tensor:
    v = torch.randn(1, 2, KEYS, head_dim, device=device, generator=torch.Generator(device).manual_seed(3))
    if kind == "outlier":
        v[:, :, KEYS // 2] *= 1000.0
    elif kind == "loud":
        v[:, :, :: KEYS // 8] *= 20.0
    elif kind == "equal":
        v = torch.ones_like(v)
    elif kind == "halves":
        v[:, :, : KEYS // 2], v[:, :, KEYS // 2 :] = 1.0, -1.0
    elif kind == "biased":
        v += 0.4
    elif kind == "block":
        v[:, :, :128], v[:, :, 128:] = 1.0, 0.0
    return v.to(torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["normal", "outlier", "loud", "equal", "halves", "biased", "block"])
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
