# SPDX-License-Identifier: Apache-2.0
"""The input distributions of the accuracy set: what quantization finds easy, and what it finds hard.

Values come from a CPU generator, so that a name and a seed mean the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]
Change = Callable[[Tensor, Tensor, Tensor, torch.Generator], QKV]

SINK_TOKENS = 4
SINK_LOGIT = 10.0
LOUD_TOKENS = 8  # of V, LOUD_GAIN times as large as the others
LOUD_GAIN = 20.0
ZERO_BLOCK = 128  # of 4 such blocks one is zero


def _per_channel(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """One constant from N(0, sigma**2) per batch, head and channel of `x` ``[B, H, S, D]``: ``[B, H, 1, D]``."""
    return sigma * torch.randn(x.shape[0], x.shape[1], 1, x.shape[3], generator=generator)


def _normal(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    return q, k, v


def _channel_outliers(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    """Constants added to every channel of K (8 sigma) and V (2 sigma) and to 10 % of the channels of Q (3 sigma)."""
    chosen = torch.randperm(q.shape[3], generator=generator)[: max(1, q.shape[3] // 10)]
    shift = torch.zeros(1, 1, 1, q.shape[3])
    shift[..., chosen] = 1.0
    return (
        q + shift * _per_channel(q, 3.0, generator),
        k + _per_channel(k, 8.0, generator),
        v + _per_channel(v, 2.0, generator),
    )


def _peaky(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    return 4.0 * q, k, v


def _sink(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    """The first 4 keys draw 10 more logits from every query than the others, and their V is small."""
    d = q.shape[3]
    axis = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    along = 4.0  # what every query has along the axis
    k, v = k.clone(), v.clone()
    k[:, :, :SINK_TOKENS] += SINK_LOGIT * d**0.5 / along * axis
    v[:, :, :SINK_TOKENS] *= 0.05
    return q + along * axis, k, v


def _v_token_outliers(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    v = v.clone()
    v[:, :, torch.randperm(v.shape[2], generator=generator)[:LOUD_TOKENS]] *= LOUD_GAIN
    return q, k, v


def _v_bias(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    return q, k, v + _per_channel(v, 2.0, generator)


def _sparse_outliers(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001), as in FlashAttention-3 (arXiv 2407.08608, section 4.3)."""

    def add(x: Tensor) -> Tensor:
        hit = torch.rand(x.shape, generator=generator) < 0.001
        return x + torch.where(hit, 10.0 * torch.randn(x.shape, generator=generator), 0.0)

    return add(q), add(k), add(v)


def _zero_blocks(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    def clear(x: Tensor, turn: int) -> Tensor:
        block = torch.arange(x.shape[2]) // ZERO_BLOCK
        return x * (block % 4 != turn).to(x.dtype)[:, None]

    return clear(q, 1), clear(k, 2), clear(v, 3)


def _constant_rows(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> QKV:
    """Every row of Q and K has one value in all its channels; logits stay of variance 1."""
    shrink = q.shape[3] ** -0.25
    return shrink * q[..., :1].expand_as(q), shrink * k[..., :1].expand_as(k), v


CHANGES: dict[str, Change] = {
    "normal": _normal,
    "channel_outliers": _channel_outliers,
    "peaky": _peaky,
    "sink": _sink,
    "v_token_outliers": _v_token_outliers,
    "v_bias": _v_bias,
    "sparse_outliers": _sparse_outliers,
    "zero_blocks": _zero_blocks,
    "constant_rows": _constant_rows,
}
NAMES = tuple(CHANGES)


def draw(
    name: str,
    *,
    batch: int = 1,
    heads: int = 8,
    heads_kv: int | None = None,
    seqlen: int = 4096,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> QKV:
    """Q, K and V of one distribution.

    Args:
        name: one of NAMES; ValueError otherwise.
        batch, heads, heads_kv, seqlen, head_dim: sizes; `heads_kv` is `heads` where it is None.
        dtype: what the fp32 values are rounded to.
        device: where the tensors go.
        seed: of the generator.

    Returns:
        Q ``[B, H, S, D]``, K and V ``[B, Hk, S, D]``, contiguous.
    """
    if name not in CHANGES:
        raise ValueError(f"distribution {name!r}; accepted: {', '.join(NAMES)}")
    generator = torch.Generator().manual_seed(seed)
    kv = heads if heads_kv is None else heads_kv
    plain = [torch.randn(batch, h, seqlen, head_dim, generator=generator) for h in (heads, kv, kv)]
    q, k, v = CHANGES[name](plain[0], plain[1], plain[2], generator)
    return (
        q.to(device, dtype).contiguous(),
        k.to(device, dtype).contiguous(),
        v.to(device, dtype).contiguous(),
    )
