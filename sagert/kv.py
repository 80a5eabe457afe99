# SPDX-License-Identifier: Apache-2.0
"""QuantizedKV: keys and values quantized once, for many calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class QuantizedKV:
    """Quantized K and V of one device, as `quantize_kv` returns them; pass it to `attention` in the place of k.

    It holds one device buffer with K in INT8, its scales and, where the precision quantizes V, V too; where the
    precision leaves V in 16 bits (int8_fp16) and the kernel reads it as it is, also a copy of V. K and V themselves are
    not kept. Immutable; it may be shared between threads, and between streams under the rules of any tensor.

    Attributes:
        data: the buffer, uint8 [bytes] on the device. Its layout is the kernel row's own.
        v: the kept copy of V [B, Hk, Sk, Dv], or None.
        shape: (B, Hk, Sk, D), whatever the layout K was given in.
        head_dim_v: Dv.
        dtype: that of K and V, which the queries must have too.
        precision: such as "int8_fp8"; never "auto".
        row: index of the kernel row that made it and reads it; -1 on the CPU.
        smooth_k: whether K's mean was taken off.
        masked: whether it was made for calls with masks, windows or bottom-right alignment.
    """

    def __init__(
        self,
        data: Tensor,
        v: Tensor | None,
        shape: tuple[int, int, int, int],
        head_dim_v: int,
        dtype: torch.dtype,
        precision: str,
        row: int,
        smooth_k: bool,
        masked: bool,
    ) -> None:
        self.data = data
        self.v = v
        self.shape = shape
        self.head_dim_v = head_dim_v
        self.dtype = dtype
        self.precision = precision
        self.row = row
        self.smooth_k = smooth_k
        self.masked = masked

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it holds."""
        return (self.data,) if self.v is None else (self.data, self.v)

    @property
    def key(self) -> tuple[object, ...]:
        """All of it but what its tensors hold, for a dictionary."""
        shapes = tuple((t.shape, t.stride(), t.get_device()) for t in self.tensors)
        return (self.shape, self.head_dim_v, self.dtype, self.precision, self.row, self.smooth_k, shapes)

    @property
    def device(self) -> torch.device:
        """Where the buffer lies."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Device memory it holds, in bytes, the kept V included."""
        kept = 0 if self.v is None else self.v.numel() * self.v.element_size()
        return self.data.numel() + kept

    def __repr__(self) -> str:
        b, h, s, d = self.shape
        return (
            f"QuantizedKV({self.precision}, B={b}, Hk={h}, Sk={s}, D={d}, Dv={self.head_dim_v}, {self.dtype}, "
            f"{self.device}, {self.nbytes} bytes)"
        )
