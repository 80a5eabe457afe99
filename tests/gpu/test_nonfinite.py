# SPDX-License-Identifier: Apache-2.0
"""NaN and Inf appear exactly where exact attention has them; constant and zero inputs stay finite."""

from __future__ import annotations

import pytest
import torch
from gpu_kit import check_placement, exact, relative_l1

import sagert

NAN, INF = float("nan"), float("inf")
PLACES = [
    ("q", [(0, 1, 40, 3)], NAN),
    ("q", [(0, 1, 40, 3)], INF),
    ("k", [(0, 0, 70, 5)], NAN),
    ("k", [(0, 0, 70, 5)], INF),
    ("k", [(0, 0, 70, 5)], -INF),
    ("v", [(0, 0, 70, 5)], NAN),
    ("v", [(0, 0, 70, 5)], INF),
    ("v", [(0, 0, 70, 5)], -INF),
    ("v", [(0, 0, 0, 0), (0, 1, 199, 63)], INF),
    ("v", [(0, 0, 130, 7), (0, 0, 5, 7)], NAN),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
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
    check_placement(200, name, where, value, dtype, causal, served, tolerance, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_tiles(head_dim: int, dtype: torch.dtype, served: list[str], device: torch.device) -> None:
    """Under a causal mask, in heads of many tiles: other queries stay finite, and other heads keep their bits."""
    heads, length = 48, 1500
    generator = torch.Generator(device=device).manual_seed(3)
    q, k, v = (torch.randn(1, heads, length, head_dim, generator=generator, device=device).to(dtype) for _ in range(3))
    bad = v.clone()
    places = [(head, key, (7 * head + key) % head_dim) for head in range(0, heads, 5) for key in (0, 191, 777, 1499)]
    for i, (head, key, channel) in enumerate(places):
        bad[0, head, key, channel] = (INF, -INF, NAN)[i % 3]
    seen = torch.zeros_like(v, dtype=torch.bool)
    for head, key, channel in places:
        seen[0, head, key:, channel] = True
    for precision in served:
        clean = sagert.attention(q, k, v, precision=precision, is_causal=True)
        out = sagert.attention(q, k, bad, precision=precision, is_causal=True)
        assert not torch.isfinite(out[seen]).any(), precision
        assert torch.isfinite(out[~seen]).all(), precision
        untouched = [head for head in range(heads) if head % 5 != 0]
        assert torch.equal(out[:, untouched], clean[:, untouched]), precision
        again = sagert.attention(q, k, bad, precision=precision, is_causal=True)
        assert torch.equal(out.view(torch.int16), again.view(torch.int16)), precision


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 60000.0])
def test_constant_inputs(value: float, served: list[str], device: torch.device) -> None:
    q = torch.full((1, 2, 130, 64), value, device=device, dtype=torch.float16)
    for precision in served:
        out = sagert.attention(q, q, q, precision=precision, is_causal=True)
        assert torch.isfinite(out).all(), precision
        assert float((out.double() - value).abs().max()) <= abs(value) * 2e-3, precision


def test_zero_channels_and_rows(served: list[str], tolerance: dict[str, float], device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 300, 64, device=device).to(torch.bfloat16) for _ in range(3))
    k[:, :, 64:128] = 0
    v[..., 5] = 0
    q[:, :, 17] = 0
    want, _ = exact(q, k, v)
    for precision in served:
        out = sagert.attention(q, k, v, precision=precision)
        assert relative_l1(out, want) <= 1.3 * tolerance[precision], precision
        assert torch.equal(out[..., 5], torch.zeros_like(out[..., 5])), precision
