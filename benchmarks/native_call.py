# SPDX-License-Identifier: Apache-2.0
"""One attention through the C ABI, its arguments packed once: any row, any feature, memory of the caller's choosing."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

import sagert
from sagert import codes, native


@dataclass(frozen=True)
class Packed:
    """Packed sequences: cumulative lengths, int32 ``[N + 1]`` on the device, and the longest sequence of each side."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def row_number(row: str) -> int:
    """What the C ABI's field `row` holds to ask for this row and no other."""
    return [r.id for r in sagert.kernels()].index(row) + 1


def _bound(side: int | None) -> int:
    return -1 if side is None else side


class NativeCall:
    """sagert_attention, on the stream that is current at construction.

    Args:
        q, k, v: CUDA tensors, ``[B, H, S, D]``, ``[B, Hk, Sk, D]`` and ``[B, Hk, Sk, Dv]`` of one 16-bit dtype; with
            `packed`, ``[total_q, H, D]``, ``[total_k, Hk, D]`` and ``[total_k, Hk, Dv]``.
        out: like `q` with Dv; written.
        precision: such as ``"int8_fp8"``.
        lse: fp32 ``[B, H, S]``, or ``[H, total_q]`` with `packed`; written.
        row: id of the row to use; the registry chooses one otherwise.
        mask: broadcastable to ``[B, H, S, Sk]``.
        causal, bottom_right, window, scale, smooth_k: as for `sagert.attention`.
        two_calls: `run` quantizes K and V into memory of their own first, and attends in a call of its own.
        margin: bytes of device memory to keep on either side of the workspace (and of that memory), see `intact`.
        poison: fill that memory beforehand; without, it is as the allocator gives it, which initcheck knows.
    """

    POISON = 0xFF  # NaN in every floating-point type

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        *,
        precision: str,
        lse: torch.Tensor | None = None,
        row: str | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        bottom_right: bool = False,
        window: tuple[int | None, int | None] | None = None,
        packed: Packed | None = None,
        scale: float | None = None,
        smooth_k: bool = True,
        two_calls: bool = False,
        margin: int = 0,
        poison: bool = True,
    ) -> None:
        self._library = native.library()
        self._poison = poison
        self._margin = margin
        self._two_calls = two_calls
        self._keep = [q, k, v, out, lse, mask, packed]
        device = q.device.index if q.device.index is not None else torch.cuda.current_device()
        totals = (0, 0)
        if packed is not None:
            totals = (q.shape[0], k.shape[0])
            batch, lengths = packed.cu_seqlens_q.numel() - 1, (packed.max_seqlen_q, packed.max_seqlen_k)
            q, k, v, out = (t.transpose(0, 1)[None] for t in (q, k, v, out))
        else:
            batch, lengths = q.shape[0], (q.shape[2], k.shape[2])
        sizes = (batch, q.shape[1], k.shape[1], *lengths, q.shape[3], v.shape[3])
        tensors = [x for t in (q, k, v, out) for x in (t.data_ptr(), *t.stride())]
        left, right = (_bound(side) for side in window or (None, None))
        flags = (
            codes.FLAG_CAUSAL * causal
            | codes.FLAG_LSE * (lse is not None)
            | codes.FLAG_MASK * (mask is not None)
            | codes.FLAG_NO_SMOOTH_K * (not smooth_k)
            | codes.FLAG_VARLEN * (packed is not None)
            | codes.FLAG_WINDOW * (left >= 0 or right >= 0)
            | codes.FLAG_BOTTOM_RIGHT * (bottom_right and (causal or left >= 0 or right >= 0))
            | codes.FLAG_QUANTIZED_KV * two_calls
        )
        tail = (
            torch.cuda.current_stream(device).cuda_stream,
            q.shape[3] ** -0.5 if scale is None else scale,
            codes.dtype_code(q.dtype),
            codes.precision_code(precision),
            flags,
            device,
        )
        mask_fields = (0, 0, 0, 0, 0)
        if mask is not None:
            mask = mask.expand(batch, q.shape[1], *lengths)
            mask_fields = (mask.data_ptr(), *mask.stride())
        bounds = (0, 0) if packed is None else (packed.cu_seqlens_q.data_ptr(), packed.cu_seqlens_k.data_ptr())
        mask_dtype = 0 if mask is None else codes.mask_dtype_code(mask.dtype)
        lse_address = 0 if lse is None else lse.data_ptr()
        self._args = ctypes.create_string_buffer(native.ARGS_SIZE)
        self._address = ctypes.addressof(self._args)

        def pack(workspace: tuple[int, int] = (0, 0), kv: tuple[int, int] = (0, 0), row: int = 0) -> None:
            fields = (native.ARGS_SIZE, *sizes, *tensors, lse_address, *workspace, *tail)
            features = (*mask_fields, mask_dtype, row, left, right, *bounds, *totals, *kv)
            native.ARGS.pack_into(self._args, 0, *fields)
            native.FEATURES.pack_into(self._args, native.ARGS.size, *features)

        number = 0 if row is None else row_number(row)
        pack(row=number)
        self._memory: list[torch.Tensor] = []
        kv = (0, 0)
        if two_calls:
            info = native.KvInfo()
            native.check(self._library.sagert_kv_plan(self._address, ctypes.byref(info)))
            kv, number = self._allocate(info.bytes, q.device), info.row + 1
            pack(kv=kv, row=number)
        needed = ctypes.c_uint64()
        native.check(self._library.sagert_workspace_size(self._address, ctypes.addressof(needed)))
        self.workspace_size = needed.value  # bytes
        pack(self._allocate(needed.value, q.device), kv, number)

    def _allocate(self, size: int, device: torch.device) -> tuple[int, int]:
        """Address and size of memory with the margin around it."""
        whole = torch.empty(size + 2 * self._margin, dtype=torch.uint8, device=device)
        if self._poison:
            whole.fill_(self.POISON)
        self._memory.append(whole)
        return whole.data_ptr() + self._margin, size

    def intact(self) -> torch.Tensor:
        """Whether nothing was written within `margin` bytes of the memory it was given: a bool tensor on the device."""
        ends = [part for t in self._memory for part in (t[: self._margin], t[t.numel() - self._margin :])]
        return (torch.cat(ends) == self.POISON).all()

    def run(self) -> None:
        """Quantizes and attends."""
        if self._two_calls:
            native.check(self._library.sagert_quantize_kv(self._address))
        native.check(self._library.sagert_attention(self._address))

    def quantize(self) -> None:
        """Fills the workspace from q, k and v."""
        native.check(self._library.sagert_quantize(self._address))

    def attend(self) -> None:
        """Computes `out` from the workspace."""
        native.check(self._library.sagert_attend(self._address))
