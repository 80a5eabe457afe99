# SPDX-License-Identifier: Apache-2.0
"""torch operators sagert::attention and sagert::attention_out, for CUDA, CPU and fake tensors.

Registered with torch.library.Library: a call costs 3.5 us, against 24 us through the custom_op decorator. Plain CUDA
tensors outside every tracing mode take `attention_direct`, which costs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagert import codes, fallback, native, reference
from sagert.errors import UnsupportedError
from sagert.settings import SETTINGS

_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
_STRICT = SETTINGS.strict
_REQUEST = "float scale, bool is_causal, int precision, bool smooth_k, bool return_lse, bool fallback_sdpa=False) -> "

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(index: int) -> int:
    """CUstream of torch's current stream on a device."""
    return int(torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index))


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised [B, H, S, Dv] in q's memory order: heads inside the sequence if q's are, else [B, H, S, Dv]."""
    b, h, s, _ = q.shape
    dv = v.shape[3]
    if h > 1 and s > 1 and q.stride(1) < q.stride(2):
        return q.new_empty_strided((b, h, s, dv), (s * h * dv, dv, h * dv, 1))
    return q.new_empty_strided((b, h, s, dv), (h * s * dv, s * dv, dv, 1))


def empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    """Uninitialised fp32 [B, H, S], or [0] where it was not asked for."""
    return q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float
) -> Tensor:
    """torch's own attention; the keyword enable_gqa is left out where it is not needed, for torch 2.4."""
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **gqa)


def _fall_back(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, is_causal: bool, reason: str) -> None:
    fallback.record(reason)
    out.copy_(sdpa(q, k, v, None, 0.0, is_causal, scale))


def _run_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    is_causal: bool,
    precision: int,
    smooth_k: bool,
    return_lse: bool,
    fallback_sdpa: bool = False,
) -> None:
    """One native call on the current stream of q's device. The current device stays as it is."""
    flags = codes.FLAG_CAUSAL if is_causal else 0
    if return_lse:
        flags |= codes.FLAG_LSE
    if not smooth_k:
        flags |= codes.FLAG_NO_SMOOTH_K
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        flags |= codes.FLAG_GRAD
    device: torch.device = q.device
    index: int = device.index
    b, h, s, d = q.shape
    dtype = _DTYPES.get(q.dtype)
    if dtype is None:
        raise UnsupportedError(f"q has dtype {q.dtype}: cast to torch.float16 or torch.bfloat16")
    lib = native._lib or native.library()
    call = native.CALL
    address = call.address
    native.ARGS.pack_into(
        call.args, 0, native.ARGS_SIZE,
        b, h, k.shape[1], s, k.shape[2], d, v.shape[3],
        q.data_ptr(), *q.stride(), k.data_ptr(), *k.stride(), v.data_ptr(), *v.stride(), out.data_ptr(), *out.stride(),
        0 if lse is None else lse.data_ptr(), 0, 0, _stream(index), scale, dtype, precision, flags, index,
    )  # fmt: skip
    # The size comes from the row the library selects, so a refusal surfaces here, before anything is launched.
    status = lib.sagert_workspace_size(address, call.bytes_address)
    if status:
        error = native.error(status)
        if fallback_sdpa and status == native.UNSUPPORTED and not return_lse:
            _fall_back(q, k, v, out, scale, is_causal, str(error))
            return
        raise error
    size = call.bytes.value
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    native.WORKSPACE.pack_into(call.args, native.WORKSPACE_OFFSET, workspace.data_ptr(), size)
    status = lib.sagert_attention(address)
    if status:
        raise native.error(status)
    if _STRICT:
        torch.cuda.synchronize(device)


# What says that no tracing or transforming mode looks on. Absent in some torch: then every call is an operator call.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_HAS_DIRECT = _dispatch_modes is not None and _transforms is not None


def is_direct(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True where a call needs no operator: plain CUDA tensors, nothing compiling, tracing or transforming."""
    return (
        type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and q.is_cuda
        and not torch.compiler.is_compiling()
        and _HAS_DIRECT
        and _dispatch_modes() == 0
        and _transforms() is None
    )


def attention_direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    scale: float,
    is_causal: bool,
    precision: int,
    smooth_k: bool,
    return_lse: bool,
    fallback_sdpa: bool,
) -> tuple[Tensor, Tensor | None]:
    """sagert::attention and attention_out without torch's dispatcher; the LSE is None where it was not asked for."""
    if out is None:
        out = empty_output(q, v)
    lse = empty_lse(q, True) if return_lse else None
    _run_cuda(q, k, v, out, lse, scale, is_causal, precision, smooth_k, return_lse, fallback_sdpa)
    return out, lse


def _run_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    precision: int,
    smooth_k: bool,
    return_lse: bool,
    fallback_sdpa: bool = False,
) -> None:
    """The reference: same arithmetic as the kernels, for every precision that has one; auto is int8_fp16."""
    name = codes.PRECISION_NAMES.get(precision, str(precision))
    name = "int8_fp16" if name == "auto" else name
    reason = None
    if name not in reference.PRECISIONS:
        accepted = ", ".join(repr(p) for p in reference.PRECISIONS)
        reason = f"precision={name!r} on the CPU: no kernel row and no reference yet; use one of {accepted}"
    elif q.dtype not in (torch.float16, torch.bfloat16):
        reason = f"q has dtype {q.dtype}: cast to torch.float16 or torch.bfloat16"
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        reason = "an input requires grad and backward is not implemented: call it under torch.no_grad()"
    if reason is not None:
        if fallback_sdpa and not return_lse:
            _fall_back(q, k, v, out, scale, is_causal, reason)
            return
        raise UnsupportedError(reason)
    result, result_lse = reference.attention(
        q, k, v, is_causal=is_causal, scale=scale, precision=name, smooth_k=smooth_k
    )
    out.copy_(result)
    if return_lse:
        lse.copy_(result_lse)


# Operators take (q, k, v, [out,] *request), `request` in the order of _REQUEST; torch leaves out arguments that have
# their default value.
_RETURN_LSE = 4


def _returning(run: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The implementation of sagert::attention that computes with `run`."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *request: Any) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(q, v), empty_lse(q, request[_RETURN_LSE])
        run(q, k, v, out, lse, *request)
        return out, lse

    return attention


def _writing(run: Callable[..., None]) -> Callable[..., Tensor]:
    """The implementation of sagert::attention_out that computes with `run`."""

    def attention_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *request: Any) -> Tensor:
        lse = empty_lse(q, request[_RETURN_LSE])
        run(q, k, v, out, lse, *request)
        return lse

    return attention_out


def _run_fake(*_: Any) -> None:
    """Shapes only."""


# The output's strides follow q's, so compiled code must hand over tensors in the order it traced.
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_torch_library: Any = torch.library
_library = _torch_library.Library("sagert", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v, " + _REQUEST + "(Tensor, Tensor)", tags=_TAGS)
_library.define("attention_out(Tensor q, Tensor k, Tensor v, Tensor(a!) out, " + _REQUEST + "Tensor", tags=_TAGS)
for _key, _run in (("CUDA", _run_cuda), ("CPU", _run_cpu)):
    _library.impl("attention", _returning(_run), _key)
    _library.impl("attention_out", _writing(_run), _key)
_torch_library.register_fake("sagert::attention", _returning(_run_fake), lib=_library)
_torch_library.register_fake("sagert::attention_out", _writing(_run_fake), lib=_library)

attention = torch.ops.sagert.attention.default
attention_out = torch.ops.sagert.attention_out.default
