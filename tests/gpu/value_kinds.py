# SPDX-License-Identifier: Apache-2.0
"""V of several kinds, for sums over many keys; also for tests that need no GPU."""

from __future__ import annotations

import torch

KINDS = ("normal", "outlier", "loud", "equal", "halves", "biased", "block", "last")


def make_kind(kind: str, v: torch.Tensor) -> torch.Tensor:
    """v [..., keys, channels], N(0, 1), made one of KINDS in place."""
    keys = v.shape[-2]
    if kind == "outlier":
        v[..., keys // 2, :] *= 1000.0
    elif kind == "loud":
        v[..., :: max(1, keys // 8), :] *= 20.0
    elif kind == "equal":
        v[...] = 1.0
    elif kind == "halves":
        v[..., : keys // 2, :], v[..., keys // 2 :, :] = 1.0, -1.0
    elif kind == "biased":
        v += 0.4
    elif kind == "block":
        v[..., :128, :], v[..., 128:, :] = 1.0, 0.0
    elif kind == "last":  # overflows in the block that is visited first
        v[..., :-128, :], v[..., -128:, :] = 0.0, 1.0
    return v
