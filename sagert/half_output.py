# SPDX-License-Identifier: Apache-2.0
"""O of the wgmma family's int8_fp8, which its kernel sums in fp16 (kernels/sm90/half_output.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SUM = 57344.0  # of P where a block begins; with outliers in V a quarter of it
SUM_STEPS = 3  # log2 of what O is divided by where the sum is beyond it
SETTLE_BLOCKS = 32
STEP = 32  # keys whose products are added at a time


def half(x: Tensor) -> Tensor:
    """Rounded to fp16, held in fp32."""
    return x.to(torch.float16).float()


class HalfOutput:
    """O [N, rows, Dv] and, beside it, the sums of P [N, rows, 1] as O is divided by them."""

    def __init__(self, like: Tensor, outliers: Tensor | None) -> None:
        """`like`: a tensor of O's shape; outliers [N, 1, 1]: heads with outliers in V."""
        self.recent, self.settled = torch.zeros_like(like), torch.zeros_like(like)
        self.sums = torch.zeros_like(like[..., :1])
        self.largest_sum = LARGEST_SUM * (1.0 if outliers is None else torch.where(outliers, 0.25, 1.0))

    def beyond(self) -> Tensor:
        """Rows whose maximum must grow by SUM_STEPS octaves at least, lest O overflow: bool [N, rows, 1]."""
        return self.sums > self.largest_sum

    def add(self, alpha: Tensor, p: Tensor, v: Tensor, block: int, last: bool) -> None:
        """Scales by alpha [N, rows, 1] and adds p [N, rows, keys] @ v [N, keys, Dv], block number `block` of keys."""
        alpha = half(alpha)
        self.recent, self.settled = half(self.recent * alpha), self.settled * alpha
        total = torch.zeros_like(self.sums)
        for start in range(0, p.shape[2], STEP):
            keys = slice(start, start + STEP)
            self.recent = half(self.recent + p[:, :, keys] @ v[:, keys])
            total = half(total + p[:, :, keys].sum(-1, keepdim=True))
        self.sums = self.sums * alpha + total
        if block % SETTLE_BLOCKS == 0 and not last:
            before = half(self.settled)
            self.settled = half(before + self.recent)
            self.recent = half(self.recent - half(self.settled - before))

    def output(self) -> Tensor:
        return self.settled + self.recent
