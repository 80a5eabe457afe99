# SPDX-License-Identifier: Apache-2.0
"""sagert's C ABI in its two steps, so that quantization and attention can be timed apart."""

from __future__ import annotations

import ctypes

import torch

from sagert import codes, native


class SplitAttention:
    """One attention whose arguments are packed once, on the stream that is current at construction.

    Args:
        q, k, v: CUDA tensors, ``[B, H, S, D]`` and twice ``[B, Hk, Sk, D]``, of one 16-bit dtype.
        out: like `q`; written by `attend`.
        causal: whether query i sees keys 0 to i only.
        precision: such as ``"int8_fp8"``.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        *,
        causal: bool,
        precision: str,
    ) -> None:
        self._library = native.library()
        self._keep = [q, k, v, out]
        device = q.device.index if q.device.index is not None else torch.cuda.current_device()
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        tensors = [x for t in (q, k, v, out) for x in (t.data_ptr(), *t.stride())]
        tail = (
            torch.cuda.current_stream(device).cuda_stream,
            q.shape[3] ** -0.5,
            codes.dtype_code(q.dtype),
            codes.precision_code(precision),
            codes.FLAG_CAUSAL if causal else 0,
            device,
        )
        self._args = ctypes.create_string_buffer(native.ARGS_SIZE)
        native.ARGS.pack_into(self._args, 0, native.ARGS_SIZE, *sizes, *tensors, 0, 0, 0, *tail)
        self._address = ctypes.addressof(self._args)
        needed = ctypes.c_uint64()
        native.check(self._library.sagert_workspace_size(self._address, ctypes.addressof(needed)))
        workspace = torch.empty(needed.value, dtype=torch.uint8, device=q.device)
        self._keep.append(workspace)
        native.ARGS.pack_into(
            self._args, 0, native.ARGS_SIZE, *sizes, *tensors, 0, workspace.data_ptr(), needed.value, *tail
        )

    def quantize(self) -> None:
        """Fills the workspace from q, k and v."""
        native.check(self._library.sagert_quantize(self._address))

    def attend(self) -> None:
        """Computes `out` from the workspace."""
        native.check(self._library.sagert_attend(self._address))
