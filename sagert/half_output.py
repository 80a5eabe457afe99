# SPDX-License-Identifier: Apache-2.0
"""O of the wgmma family's int8_fp8, which its kernel sums in fp16 (kernels/sm90/half_output.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SUM = 4096.0  # of P where a block begins
LARGEST_FIRST_SUM, FIRST_BLOCKS = 512.0, 4  # the same in the first blocks that a query visits
SUM_STEPS = 3  # log2 of what O and P are divided by where the sum is beyond it
SETTLE_BLOCKS = 32
STEP = 32  # keys whose products are added at a time


def half(x: Tensor) -> Tensor:
    """Rounded to fp16, held in fp32."""
    return x.to(torch.float16).float()


class HalfOutput:
    """O [N, rows, Dv], the sums of P [N, rows, 1] that it is divided by, and what P has been divided by."""

    def __init__(self, like: Tensor) -> None:
        """`like`: a tensor of O's shape."""
        self.recent, self.settled = torch.zeros_like(like), torch.zeros_like(like)
        self.sums = torch.zeros_like(like[..., :1])
        self.steps = torch.zeros_like(self.sums)  # log2 of it
        self.visited = torch.zeros_like(self.sums)  # blocks

    def bound(self) -> Tensor:
        """By how many octaves O and P have to become smaller now, lest O overflow: [N, rows, 1]."""
        largest = torch.where(self.visited < FIRST_BLOCKS, LARGEST_FIRST_SUM, LARGEST_SUM)
        steps = torch.where(self.sums > largest, float(SUM_STEPS), 0.0)
        self.steps = self.steps + steps
        return steps

    def add(self, alpha: Tensor, p: Tensor, v: Tensor, block: int, seen: Tensor) -> None:
        """Scales by alpha [N, rows, 1] and adds p [N, rows, keys] @ v [N, keys, Dv], block number `block` of keys.

        seen: bool [N, rows, 1], rows that have a visible key in this block or had one before.
        """
        alpha = half(alpha)
        self.recent, self.settled = half(self.recent * alpha), self.settled * alpha
        total = torch.zeros_like(self.sums)
        for start in range(0, p.shape[2], STEP):
            keys = slice(start, start + STEP)
            self.recent = half(self.recent + p[:, :, keys] @ v[:, keys])
            total = half(total + p[:, :, keys].sum(-1, keepdim=True))
        self.sums = self.sums * alpha + total
        self.visited = self.visited + seen
        if block % SETTLE_BLOCKS == 0:
            before = half(self.settled)
            self.settled = half(before + self.recent)
            self.recent = half(self.recent - half(self.settled - before))

    def output(self) -> Tensor:
        return self.settled + self.recent
