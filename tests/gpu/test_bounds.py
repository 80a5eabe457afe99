# SPDX-License-Identifier: Apache-2.0
"""Scores of any size: a bound stands in for row maxima where it is small enough (kernels/common/bounds.cuh)."""

from __future__ import annotations

import pytest
import torch
from gpu_kit import arithmetic, relative_l1, serving_row

import sagert
from sagert import reference

NEAR, NEAR_LSE = 0.003, 0.02  # kernels add in another order than the reference, and have other last bits of exp2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rise", [1.0, 6.0], ids=["even", "rising"])
@pytest.mark.parametrize("factor", [0.01, 1.0, 2.0, 2.4, 4.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_any_size(
    head_dim: int, dtype: torch.dtype, factor: float, rise: float, causal: bool, served: list[str], device: torch.device
) -> None:
    """As the reference; keys are visited from the last one down, so that in `rising` later ones score far more."""
    precision = "int8_fp16"
    if precision not in served:
        pytest.skip(f"{precision} is not served here")
    generator = torch.Generator().manual_seed(head_dim)
    q, k, v = (torch.randn(1, 2, 500, head_dim, generator=generator) for _ in range(3))
    k *= torch.linspace(rise, 1, k.shape[2])[:, None]
    q, k, v = ((x * f).to(dtype) for x, f in ((q, factor), (k, factor), (v, 1.0)))
    on_device = [x.to(device) for x in (q, k, v)]
    out, lse = sagert.attention(*on_device, is_causal=causal, precision=precision, return_lse=True)
    plain = sagert.attention(*on_device, is_causal=causal, precision=precision)
    row = serving_row(*on_device, causal, precision)
    assert torch.equal(out, plain)
    options = arithmetic(row, head_dim)
    near, near_lse = reference.attention(q, k, v, is_causal=causal, precision=precision, **options)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert relative_l1(out.cpu(), near) <= NEAR
    # A code that rounds the other way moves a score in proportion to its size.
    assert float((lse.cpu() - near_lse).abs().max()) <= NEAR_LSE * max(1, factor**2 * rise)
