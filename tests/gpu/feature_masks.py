# SPDX-License-Identifier: Apache-2.0
"""Masks of the feature tests: what they hide, the shapes they broadcast from, dtypes and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_kit import place

DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
# One letter an axis: b, h, q, k as large as the problem, 1 broadcast; fewer than four axes are the last ones.
SHAPES = ("bhqk", "qk", "b1qk", "1hqk", "b11k", "k", "hqk", "11q1", "1k", "111k", "bhq1", "11qk", "1qk")
MEMORY = ("bhsd", "sliced", "strided_last", "offset", "permuted", "bshd")
BLOCK = 128

Draw = Callable[[tuple[int, int, int, int], torch.Generator, torch.device], torch.Tensor]


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a mask hides, its dtype, the shape it broadcasts from, how it lies in memory, and one of BIASES."""

    pattern: str
    dtype: torch.dtype
    shape: str
    memory: str
    bias: str = "normal"

    def __str__(self) -> str:
        dtype = "bool" if self.dtype == torch.bool else f"{str(self.dtype).removeprefix('torch.')}.{self.bias}"
        return f"{dtype}.{self.pattern}.{self.shape}.{self.memory}"


def _grid(size: tuple[int, int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(size[2], device=device)[:, None], torch.arange(size[3], device=device)


def _random(share: float) -> Draw:
    def draw(size: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device) < share

    return draw


def _banded(size: tuple[int, int, int, int], _: torch.Generator, device: torch.device) -> torch.Tensor:
    i, j = _grid(size, device)
    return ((j - i * size[3] // max(size[2], 1)).abs() <= 40).expand(size)


def _causal_like(size: tuple[int, int, int, int], _: torch.Generator, device: torch.device) -> torch.Tensor:
    i, j = _grid(size, device)
    return (j <= i).expand(size)


def _empty_rows(size: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    some = torch.rand((*size[:3], 1), generator=generator, device=device) < 0.6
    return some & (torch.rand(size, generator=generator, device=device) < 0.5)


def _blocks(size: tuple[int, int, int, int], _: torch.Generator, device: torch.device) -> torch.Tensor:
    i, j = _grid(size, device)
    return ((i // BLOCK + j // BLOCK) % 2 == 0).expand(size)


def _random_blocks(size: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    tiles = (*size[:2], -(-size[2] // BLOCK), -(-size[3] // BLOCK))
    kept = torch.rand(tiles, generator=generator, device=device) < 0.4
    return kept.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, : size[2], : size[3]]


def _padding(size: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    lengths = torch.rand((*size[:2], 1, 1), generator=generator, device=device) * (size[3] + 1)
    return (torch.arange(size[3], device=device) < lengths.long()).expand(size)


def _last(size: tuple[int, int, int, int], _: torch.Generator, device: torch.device) -> torch.Tensor:
    return (torch.arange(size[3], device=device) >= size[3] - 1).expand(size)


PATTERNS: dict[str, Draw] = {
    "random": _random(0.5),
    "blocks": _blocks,
    "empty_rows": _empty_rows,
    "causal_like": _causal_like,
    "sparse": _random(0.02),
    "banded": _banded,
    "padding": _padding,
    "dense": _random(0.98),
    "random_blocks": _random_blocks,
    "last": _last,
    "all": _random(2.0),
    "nothing": _random(-1.0),
}
# What a floating-point mask holds at the keys it does not hide; with "lowest", 0, and the hidden ones have the dtype's
# lowest number where others have -inf. As queries that see only such keys are no one's business, key 0 is then kept.
BIASES = ("normal", "zero", "slope", "lowest")


def draw_mask(
    spec: MaskSpec,
    sizes: tuple[int, int, int, int],
    generator: torch.Generator,
    device: torch.device,
    margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of `spec` for a problem of `sizes` B, H, S, Sk.

    Returns:
        The mask in the shape it broadcasts from, and the whole buffer it lies in.
    """
    named = dict(zip("bhqk", sizes, strict=True)) | {"1": 1}
    axes = spec.shape.rjust(4, "1")
    size = (named[axes[0]], named[axes[1]], named[axes[2]], named[axes[3]])
    kept = PATTERNS[spec.pattern](size, generator, device)
    if spec.dtype == torch.bool:
        view, whole = place(kept, spec.memory, True, margin)
    else:
        hidden = float("-inf")
        if spec.bias == "normal":
            values = torch.randn(size, generator=generator, device=device)
        elif spec.bias == "slope":
            i, j = _grid(size, device)
            values = (-0.05 * (i - j).abs()).expand(size)
        else:
            values = torch.zeros(size, device=device)
        if spec.bias == "lowest":
            hidden = torch.finfo(spec.dtype).min
            kept = kept | (torch.arange(size[3], device=device) == 0)
        values = values.masked_fill(~kept, hidden).to(spec.dtype)
        view, whole = place(values, spec.memory, float("nan"), margin)
    return view[(0,) * (4 - len(spec.shape))], whole
