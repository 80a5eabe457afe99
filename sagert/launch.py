# SPDX-License-Identifier: Apache-2.0
"""CUDA tensors: one native call on the current stream of their device. The current device stays as it is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagert import codes, fallback, native, plans, sdpa
from sagert.errors import UnsupportedError
from sagert.options import Options
from sagert.plans import Keep
from sagert.settings import SETTINGS

_DTYPES = {torch.float16: 1, torch.bfloat16: 2}
_MASK_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.bool: 4}
_STRICT = SETTINGS.strict
_NO_TENSOR = (0, 0, 0, 0, 0)
_MASKED = codes.FLAG_MASK | codes.FLAG_WINDOW | codes.FLAG_BOTTOM_RIGHT


def _dtype(name: str, tensor: Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise UnsupportedError(
            f"{name} has dtype {tensor.dtype}: cast to torch.float16 or torch.bfloat16 (fp32 is computed through bf16)"
        )
    return code


def _grad_flag(*tensors: Tensor | None) -> int:
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return codes.FLAG_GRAD if asked else 0


def narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernels take them: fp32 through bf16."""
    return tuple(t.to(torch.bfloat16) if t.dtype is torch.float32 else t for t in tensors)


def _describe(tensor: Tensor) -> tuple[int, ...]:
    """A sagert_tensor of a tensor in the order B, H, S, D, or packed as [total, H, D]."""
    if tensor.dim() == 3:
        s, h, d = tensor.stride()
        return tensor.data_ptr(), 0, h, s, d
    return tensor.data_ptr(), *tensor.stride()


def _attend(arguments: native.Arguments, size: int, like: Tensor) -> None:
    """Launches with a workspace of that size."""
    workspace = like.new_empty(size, dtype=torch.uint8)
    arguments.words[native.WORKSPACE] = workspace.data_ptr()
    arguments.words[native.WORKSPACE_SIZE] = size
    status = (native._lib or native.library()).sagert_attention(arguments.address)
    if status:
        raise native.error(status)
    if _STRICT:
        torch.cuda.synchronize(like.device)


def _into(out: Tensor, run: Callable[[Tensor], None], exact: Callable[[], Tensor] | None) -> None:
    """Fills `out` by `run`, through a 16-bit tensor where out is fp32; by `exact` where the library refuses."""
    target = torch.empty_like(out, dtype=torch.bfloat16) if out.dtype is torch.float32 else out
    try:
        run(target)
    except UnsupportedError as error:
        if exact is None:
            raise
        fallback.record(str(error))
        target = exact()
    if target is not out:
        out.copy_(target)
    elif plans.increment_version is not None and not out.is_inference():
        plans.increment_version(out)


def _masked(mask: Tensor | None, b: int, h: int, s: int, sk: int) -> tuple[tuple[int, ...], int, int]:
    """(sagert_tensor, dtype code, flag) of a mask that broadcasts to [B, H, S, Sk]; no copy."""
    if mask is None:
        return _NO_TENSOR, 0, 0
    whole = mask.expand(b, h, s, sk)
    return (whole.data_ptr(), *whole.stride()), _MASK_DTYPES[mask.dtype], codes.FLAG_MASK


def _pack(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, mask: Tensor | None, options: Options
) -> native.Arguments:
    b, h, s, d = q.shape
    sk = k.shape[2]
    index = plans.index_of(q)
    tensor, mask_dtype, mask_flag = _masked(mask, b, h, s, sk)
    flags = options.flags | mask_flag | _grad_flag(q, k, v)
    features = None
    if flags & (codes.FLAG_MASK | codes.FLAG_WINDOW):
        features = (*tensor, mask_dtype, 0, options.window_left, options.window_right, 0, 0, 0, 0, 0, 0)
    values = (
        b, h, k.shape[1], s, sk, d, v.shape[3], *_describe(q), *_describe(k), *_describe(v), *_describe(out),
        0 if lse is None else lse.data_ptr(), 0, 0, plans.stream_of(index), options.scale, _dtype("q", q),
        options.precision, flags, index,
    )  # fmt: skip
    return native.Arguments(values, features)


def attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *rest: Any,
    keep: Keep | None = None,
) -> None:
    """q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], a mask that broadcasts to [B, H, S, Sk].

    `rest` is Options.
    """
    options = Options(*rest)

    def run(target: Tensor) -> None:
        q16, k16, v16 = narrow(q, k, v)
        arguments = _pack(q16, k16, v16, target, lse, mask, options)
        size = plans.workspace_size(arguments)
        _attend(arguments, size, q)
        if keep is not None and target is out:
            tensors = ((native.Q, q), (native.K, k), (native.V, v), (native.MASK, mask))
            keep.plan(arguments, size, tensors, out, lse)

    def exact() -> Tensor:
        return sdpa.attention(q, k, v, mask, 0.0, options.pattern, options.scale)

    _into(out, run, exact if options.fallback_sdpa and not options.return_lse else None)


def attention_varlen(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
    keep: Keep | None = None,
) -> None:
    """q [total_q, H, D], k [total_k, Hk, D], v [total_k, Hk, Dv], cu_seqlens int32 [N + 1] contiguous."""
    options = Options(*rest)
    index = plans.index_of(q)

    def run(target: Tensor) -> None:
        q16, k16, v16 = narrow(q, k, v)
        flags = options.flags | codes.FLAG_VARLEN | _grad_flag(q, k, v)
        features = (
            *_NO_TENSOR, 0, 0, options.window_left, options.window_right, cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(), q.shape[0], k.shape[0], 0, 0,
        )  # fmt: skip
        values = (
            cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1], max_seqlen_q, max_seqlen_k, q.shape[2], v.shape[2],
            *_describe(q16), *_describe(k16), *_describe(v16), *_describe(target),
            0 if lse is None else lse.data_ptr(), 0, 0, plans.stream_of(index), options.scale, _dtype("q", q16),
            options.precision, flags, index,
        )  # fmt: skip
        arguments = native.Arguments(values, features)
        size = plans.workspace_size(arguments)
        _attend(arguments, size, q)
        if keep is not None and target is out:
            lengths = ((native.CU_SEQLENS_Q, cu_seqlens_q), (native.CU_SEQLENS_K, cu_seqlens_k))
            keep.plan(arguments, size, ((native.Q, q), (native.K, k), (native.V, v), *lengths), out, lse)

    def exact() -> Tensor:
        return sdpa.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, options.pattern, options.scale)

    _into(out, run, exact if options.fallback_sdpa and not options.return_lse else None)


def attention_kv(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    data: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    heads_kv: int,
    seqlen_k: int,
    head_dim_v: int,
    row: int,
    *rest: Any,
    keep: Keep | None = None,
) -> None:
    """q [B, H, S, D] over the buffer and the kept V of quantize_kv."""
    options = Options(*rest)
    b, h, s, d = q.shape
    index = plans.index_of(q)

    def run(target: Tensor) -> None:
        (q16,) = narrow(q)
        tensor, mask_dtype, mask_flag = _masked(mask, b, h, s, seqlen_k)
        flags = options.flags | mask_flag | codes.FLAG_QUANTIZED_KV | _grad_flag(q, v)
        features = (
            *tensor, mask_dtype, row + 1, options.window_left, options.window_right, 0, 0, 0, 0,
            data.data_ptr(), data.shape[0],
        )  # fmt: skip
        values = (
            b, h, heads_kv, s, seqlen_k, d, head_dim_v, *_describe(q16), *_NO_TENSOR,
            *(_NO_TENSOR if v is None else _describe(v)), *_describe(target), 0 if lse is None else lse.data_ptr(), 0,
            0, plans.stream_of(index), options.scale, _dtype("q", q16), options.precision, flags, index,
        )  # fmt: skip
        arguments = native.Arguments(values, features)
        try:
            size = plans.workspace_size(arguments)
        except UnsupportedError as error:
            if not flags & _MASKED:
                raise
            hint = "this QuantizedKV's row serves no such mask or window: make it with quantize_kv(..., masked=True)"
            raise UnsupportedError(f"{hint}\n{error}") from error
        _attend(arguments, size, q)
        if keep is not None and target is out:
            keep.plan(arguments, size, ((native.Q, q), (native.KV, data), (native.V, v), (native.MASK, mask)), out, lse)

    _into(out, run, None)


Shape = tuple[int, ...]


def _pack_kv(
    k: Shape, v: Shape, shape: Shape, head_dim_v: int, dtype: int, precision: int, flags: int, mask_dtype: int,
    row: int, data: int, size: int, index: int,
) -> native.Arguments:  # fmt: skip
    """`k` and `v` as sagert_tensor, `shape` of K. The queries are not known yet: the library looks at none."""
    b, h, sk, d = shape
    features = (*_NO_TENSOR, mask_dtype, row + 1, -1, -1, 0, 0, 0, 0, data, size)
    values = (
        b, h, h, sk, sk, d, head_dim_v, *_NO_TENSOR, *k, *v, *_NO_TENSOR, 0, 0, 0,
        plans.stream_of(index) if data else 0, 1.0, dtype, precision, flags | codes.FLAG_QUANTIZED_KV, index,
    )  # fmt: skip
    return native.Arguments(values, features)


def kv_plan(
    k: Shape, v: Shape, shape: Shape, head_dim_v: int, dtype: int, precision: int, smooth_k: bool, masked: bool,
    row: int, index: int,
) -> tuple[int, int, bool]:  # fmt: skip
    """(bytes, row, whether attention still reads V) of quantizing K of `shape` and V; row < 0 lets it choose.

    k and v are (address, strides): the plan depends on how they may be read.
    """
    flags, mask_dtype = 0 if smooth_k else codes.FLAG_NO_SMOOTH_K, 0
    if masked and row < 0:
        flags |= _MASKED
        mask_dtype = codes.MASK_DTYPES["bool"]
    info = native.KvInfo()
    arguments = _pack_kv(k, v, shape, head_dim_v, dtype, precision, flags, mask_dtype, row, 0, 0, index)
    native.check(native.library().sagert_kv_plan(arguments.address, ctypes.byref(info)))
    return info.bytes, info.row, bool(info.reads_v)


def quantize_kv(
    k: Tensor, v: Tensor, precision: int, smooth_k: bool, row: int, size: int, *, keep: Keep | None = None
) -> Tensor:
    """The buffer of a plan, uint8 [size], from k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] in 16 bits."""
    data = k.new_empty(size, dtype=torch.uint8)
    flags = (0 if smooth_k else codes.FLAG_NO_SMOOTH_K) | _grad_flag(k, v)
    arguments = _pack_kv(
        _describe(k), _describe(v), k.shape, v.shape[3], _dtype("k", k), precision, flags, 0, row, data.data_ptr(),
        size, plans.index_of(k),
    )  # fmt: skip
    native.check(native.library().sagert_quantize_kv(arguments.address))
    if _STRICT:
        torch.cuda.synchronize(k.device)
    if keep is not None:
        keep.plan(arguments, 0, ((native.K, k), (native.V, v)), data, place=native.KV, run="sagert_quantize_kv")
    return data
