# SPDX-License-Identifier: Apache-2.0
"""O of the wgmma family's int8_fp8, which its kernel sums in fp16 (kernels/sm90/half_sums.cuh)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_KEYS = {"fp16": 16, "fp8": 32}  # whose products a tensor-core instruction adds to a sum in fp16, by V's type
LOG2_P = math.log2(112.0)  # at a row's maximum, as long as P has not been scaled down
LARGEST_SUM, SUM_EXPONENT = 16384.0, 12  # of P where it is looked at, and the exponent of a larger one, scaled down
SETTLE_KEYS = 4096  # about as many
LARGEST_KEYS = 256 * 128  # that are summed in fp16, in whole steps


def settle_steps(keys: int) -> int:
    """Steps of so many keys behind which sums settle. Before that they are looked at behind an eighth, and a half."""
    return max(8, 8 * round(SETTLE_KEYS / (8 * keys)))


def half(x: Tensor) -> Tensor:
    """Rounded to fp16, held in fp32."""
    return x.to(torch.float16).float()


def add_products(total: Tensor, p: Tensor, v: Tensor, keys: int) -> Tensor:
    """total + p @ v as the tensor core sums in fp16: rounded after the products of every `keys` keys."""
    for start in range(0, p.shape[2], keys):
        part = slice(start, start + keys)
        total = half(total + p[:, :, part] @ v[:, part])
    return total


class HalfOutput:
    """O [N, rows, Dv], and the sums of P [N, rows, 1] that it is divided by."""

    def __init__(self, like: Tensor, keys: int = 128) -> None:
        """`like`: a tensor of O's shape; `keys` of a step."""
        self.settle_steps, self.largest_steps = settle_steps(keys), -(-LARGEST_KEYS // keys)
        self.recent, self.settled = torch.zeros_like(like), torch.zeros_like(like)
        self.sums = torch.zeros_like(like[..., :1])
        self.factor = torch.ones_like(self.sums)  # what `settled` is to be multiplied by
        self.visited = torch.zeros_like(self.sums)  # steps

    def _scale(self, factor: Tensor) -> None:
        self.recent = half(self.recent * factor)
        self.factor = self.factor * factor
        self.sums = self.sums * factor

    def add(self, alpha: Tensor, p: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Scales by alpha [N, rows, 1] and adds p [N, rows, keys] @ v [N, keys, Dv], a step of keys.

        seen: bool [N, rows, 1], rows that have a visible key in this step or had one before. Returns by how many
        octaves P is smaller from now on [N, rows, 1]: O and its sums are already.
        """
        self._scale(half(alpha))
        self.recent = add_products(self.recent, p, v, HALF_KEYS["fp8"])
        ones = torch.ones_like(v[..., :1])  # the tensor core adds P up beside P V
        self.sums = self.sums + add_products(torch.zeros_like(self.sums), p, ones, HALF_KEYS["fp8"])
        self.visited = self.visited + seen
        early = (self.visited == self.settle_steps // 8) | (self.visited == self.settle_steps // 2)
        settles = (self.visited > 0) & (self.visited % self.settle_steps == 0)
        looked_at = early | settles
        beyond = looked_at & (self.sums > LARGEST_SUM)
        steps = torch.where(beyond, torch.frexp(self.sums).exponent - 1.0 - SUM_EXPONENT, 0.0)
        self._scale(torch.exp2(-steps))
        if settles.any():
            before = half(self.settled * half(self.factor))
            after = half(before + self.recent)
            rest = half(self.recent - half(after - before))
            self.factor = torch.where(settles, 1.0, self.factor)
            self.settled = torch.where(settles, after, self.settled)
            self.recent = torch.where(settles, rest, self.recent)
        return steps

    def output(self) -> Tensor:
        """O in fp32."""
        return self.settled * self.factor + self.recent

    def overflown(self) -> Tensor:
        """Rows that the kernel sums in fp32: those that have left fp16's range, and long ones. Bool [N, rows, 1]."""
        return ~self.recent.isfinite().all(-1, keepdim=True) | (self.visited > self.largest_steps)
