# SPDX-License-Identifier: Apache-2.0
"""Calls attention of a real libsagert on CPU tensors, in a process whose driver is the emulating one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tests.kit import abi

DTYPES = {torch.float16: abi.FP16, torch.bfloat16: abi.BF16}
PRECISIONS = {
    "int8_fp16": abi.INT8_FP16, "int8_fp8": abi.INT8_FP8, "int8_int8": abi.INT8_INT8, "int4_fp16": abi.INT4_FP16,
    "int4_fp8": abi.INT4_FP8, "int4_int8": abi.INT4_INT8,
}  # fmt: skip
MARGIN = 4096  # bytes on either side of what kernels may write
POISON = 0xA5
_libraries: dict[str, abi.Library] = {}


@dataclass(frozen=True)
class Outcome:
    """What a call gave, and whether it kept to its memory."""

    out: torch.Tensor
    lse: torch.Tensor
    status: int
    error: str
    outside: list[str]  # what was written outside the places for it


class Fenced:
    """Memory filled with a pattern, with a margin of it on either side."""

    def __init__(self, size: int, fill: int = POISON) -> None:
        self.size = size
        self.whole = torch.full((size + 2 * MARGIN + 256,), fill, dtype=torch.uint8)
        self.start = MARGIN + -(self.whole.data_ptr() + MARGIN) % 256
        self.fill = fill

    @property
    def inside(self) -> torch.Tensor:
        return self.whole[self.start : self.start + self.size]

    def intact(self) -> bool:
        """Whether the margins are as they were."""
        ends = (self.whole[: self.start], self.whole[self.start + self.size :])
        return all(bool((end == self.fill).all()) for end in ends)


def _tensor(x: torch.Tensor) -> abi.Tensor:
    return abi.Tensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


def _row(library: abi.Library, name: str) -> int:
    names = [row.id.decode() for row in library.rows()]
    return names.index(name) + 1


def attention(
    path: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    precision: str,
    causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    out: torch.Tensor | None = None,
    row: str = "",
    with_lse: bool = True,
) -> Outcome:
    """q [B, H, S, D], k and v [B, Hk, Sk, D]; `out`: where the output goes, if not to dense memory."""
    library = _libraries.setdefault(path, abi.Library(path))
    b, h, s, d = q.shape
    dv = v.shape[3]
    before = [x.clone() for x in (q, k, v)]
    place = Fenced(b * h * s * dv * q.element_size())
    if out is None:
        out = place.inside.view(q.dtype).view(b, h, s, dv)
    lse = Fenced(b * h * s * 4)
    flags = abi.LSE * with_lse | abi.CAUSAL * causal | abi.NO_SMOOTH_K * (not smooth_k)
    args = abi.AttentionArgs(
        batch=b, heads_q=h, heads_kv=k.shape[1], seqlen_q=s, seqlen_k=k.shape[2], head_dim=d, head_dim_v=dv,
        q=_tensor(q), k=_tensor(k), v=_tensor(v), out=_tensor(out),
        lse=lse.inside.data_ptr() if with_lse else 0,
        scale=d**-0.5 if scale is None else scale, dtype=DTYPES[q.dtype], precision=PRECISIONS[precision], flags=flags,
        row=_row(library, row) if row else 0,
    )  # fmt: skip
    status, size = library.workspace_size(args)
    space = Fenced(size, 0xFF)
    args.workspace, args.workspace_size = space.inside.data_ptr(), size
    status = status or library.attention(args)
    outside = [name for name, x in (("output", place), ("LSE", lse), ("workspace", space)) if not x.intact()]
    outside += [name for name, x, y in zip("qkv", (q, k, v), before, strict=True) if not _same(x, y)]
    found = lse.inside.view(torch.float32).view(b, h, s)
    return Outcome(out, found, status, library.error() if status else "", outside)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int16), y.contiguous().view(torch.int16))
