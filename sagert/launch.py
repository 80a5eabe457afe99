# SPDX-License-Identifier: Apache-2.0
"""CUDA tensors: one native call on the current stream of their device. The current device stays as it is."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagert import codes, fallback, native, sdpa
from sagert.errors import UnsupportedError
from sagert.options import Options
from sagert.settings import SETTINGS

_DTYPES = {torch.float16: 1, torch.bfloat16: 2}
_MASK_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.bool: 4}
_STRICT = SETTINGS.strict
_VECTOR = 15  # low bits of an address that decide how a kernel may load
_PLANS_MAX = 512  # per thread, of some 2 KB each
_NO_TENSOR = (0, 0, 0, 0, 0)
_MASKED = codes.FLAG_MASK | codes.FLAG_WINDOW | codes.FLAG_BOTTOM_RIGHT

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_increment_version: Any = getattr(getattr(torch.autograd, "graph", None), "increment_version", None)


def _stream(index: int) -> int:
    """CUstream of torch's current stream on a device."""
    return int(torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index))


def _index(tensor: Tensor) -> int:
    """CUDA ordinal of a tensor's device."""
    index: int = tensor.device.index
    return index


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


def _size(arguments: native.Arguments) -> int:
    """Bytes of workspace. The row is selected for it, so a refusal surfaces here, before anything is launched."""
    need = ctypes.c_uint64()
    status = (native._lib or native.library()).sagert_workspace_size(arguments.address, ctypes.addressof(need))
    if status:
        raise native.error(status)
    return need.value


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
    elif _increment_version is not None and not out.is_inference():
        _increment_version(out)


def _masked(mask: Tensor | None, b: int, h: int, s: int, sk: int) -> tuple[tuple[int, ...], int, int]:
    """(sagert_tensor, dtype code, flag) of a mask that broadcasts to [B, H, S, Sk]; no copy."""
    if mask is None:
        return _NO_TENSOR, 0, 0
    whole = mask.expand(b, h, s, sk)
    return (whole.data_ptr(), *whole.stride()), _MASK_DTYPES[mask.dtype], codes.FLAG_MASK


class Plan:
    """One prepared plain call: validated, selected and packed; its pointers and stream change from call to call.

    The workspace's size depends on shapes, strides, options and device, which the plan's key holds, and on the
    alignment of the inputs: the plan's is for aligned ones, and the library is asked for others.
    """

    __slots__ = ("arguments", "device", "half", "index", "lse", "out", "run", "size")

    def __init__(self, arguments: native.Arguments, size: int, out: Tensor, lse: Tensor | None, index: int) -> None:
        self.arguments, self.size, self.index = arguments, size, index
        self.device = out.device
        self.half = out.dtype is torch.float16
        self.out = (out.shape, out.stride(), out.dtype)  # of a tensor in the caller's layout
        self.lse = None if lse is None else lse.shape
        self.run = native.library().sagert_attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """The call with other tensors of the same key."""
        words = self.arguments.words
        device = self.device
        shape, stride, dtype = self.out
        out = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        words[8] = q_data = q.data_ptr()  # native.Q and so on, written out because this is the hot path
        words[13] = k_data = k.data_ptr()
        words[18] = v_data = v.data_ptr()
        words[23] = out.data_ptr()
        lse = None
        if self.lse is not None:
            lse = torch.empty(self.lse, dtype=torch.float32, device=device)
            words[28] = lse.data_ptr()
        size = _size(self.arguments) if (q_data | k_data | v_data) & _VECTOR else self.size
        workspace = torch.empty_strided((size,), (1,), dtype=torch.uint8, device=device)
        words[29] = workspace.data_ptr()
        words[30] = size
        words[31] = _stream(self.index) if _raw_stream is None else _raw_stream(self.index)
        status = self.run(self.arguments.address)
        if status:
            raise native.error(status)
        if _STRICT:
            torch.cuda.synchronize(device)
        return out if lse is None else (out, lse)


class _Plans(threading.local):
    """The plans of one thread by their keys: their structs may not be shared."""

    def __init__(self) -> None:
        self.by_key: dict[Any, Plan] = {}


PLANS = _Plans()


def remember(key: Any, arguments: native.Arguments, size: int, out: Tensor, lse: Tensor | None, q: Tensor) -> None:
    """Keeps a plain call, just run, as the plan of `key`; `out` is in the caller's layout."""
    plans = PLANS.by_key
    if len(plans) >= _PLANS_MAX:  # lengths that grow call by call leave plans that no call needs again
        plans.clear()
    plans[key] = Plan(arguments, size, out, lse, _index(q))


def _pack(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, mask: Tensor | None, options: Options
) -> native.Arguments:
    b, h, s, d = q.shape
    sk = k.shape[2]
    index = _index(q)
    tensor, mask_dtype, mask_flag = _masked(mask, b, h, s, sk)
    flags = options.flags | mask_flag | _grad_flag(q, k, v)
    features = None
    if flags & (codes.FLAG_MASK | codes.FLAG_WINDOW):
        features = (*tensor, mask_dtype, 0, options.window_left, options.window_right, 0, 0, 0, 0, 0, 0)
    values = (
        b, h, k.shape[1], s, sk, d, v.shape[3], *_describe(q), *_describe(k), *_describe(v), *_describe(out),
        0 if lse is None else lse.data_ptr(), 0, 0, _stream(index), options.scale, _dtype("q", q), options.precision,
        flags, index,
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
    key: Any = None,
    layout: str = "BHSD",
) -> None:
    """q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], a mask that broadcasts to [B, H, S, Sk]; `rest` is Options.

    `key` stands for all but the tensors' contents; under it a plain call is kept as a Plan, for a caller in `layout`.
    """
    options = Options(*rest)

    def run(target: Tensor) -> None:
        q16, k16, v16 = narrow(q, k, v)
        arguments = _pack(q16, k16, v16, target, lse, mask, options)
        size = _size(arguments)
        _attend(arguments, size, q)
        aligned = not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _VECTOR
        if key is not None and target is out and aligned:
            remember(key, arguments, size, out.transpose(1, 2) if layout == "BSHD" else out, lse, q)

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
) -> None:
    """q [total_q, H, D], k [total_k, Hk, D], v [total_k, Hk, Dv], cu_seqlens int32 [N + 1] contiguous."""
    options = Options(*rest)
    index = _index(q)

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
            0 if lse is None else lse.data_ptr(), 0, 0, _stream(index), options.scale, _dtype("q", q16),
            options.precision, flags, index,
        )  # fmt: skip
        arguments = native.Arguments(values, features)
        _attend(arguments, _size(arguments), q)

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
) -> None:
    """q [B, H, S, D] over the buffer and the kept V of quantize_kv."""
    options = Options(*rest)
    b, h, s, d = q.shape
    index = _index(q)

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
            0, _stream(index), options.scale, _dtype("q", q16), options.precision, flags, index,
        )  # fmt: skip
        arguments = native.Arguments(values, features)
        try:
            size = _size(arguments)
        except UnsupportedError as error:
            if not flags & _MASKED:
                raise
            hint = "this QuantizedKV's row serves no such mask or window: make it with quantize_kv(..., masked=True)"
            raise UnsupportedError(f"{hint}\n{error}") from error
        _attend(arguments, size, q)

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
        b, h, h, sk, sk, d, head_dim_v, *_NO_TENSOR, *k, *v, *_NO_TENSOR, 0, 0, 0, _stream(index) if data else 0, 1.0,
        dtype, precision, flags | codes.FLAG_QUANTIZED_KV, index,
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


def quantize_kv(k: Tensor, v: Tensor, precision: int, smooth_k: bool, row: int, size: int) -> Tensor:
    """The buffer of a plan, uint8 [size], from k [B, Hk, Sk, D] and v [B, Hk, Sk, Dv] in 16 bits."""
    data = k.new_empty(size, dtype=torch.uint8)
    flags = (0 if smooth_k else codes.FLAG_NO_SMOOTH_K) | _grad_flag(k, v)
    arguments = _pack_kv(
        _describe(k), _describe(v), k.shape, v.shape[3], _dtype("k", k), precision, flags, 0, row, data.data_ptr(),
        size, _index(k),
    )  # fmt: skip
    native.check(native.library().sagert_quantize_kv(arguments.address))
    if _STRICT:
        torch.cuda.synchronize(k.device)
    return data
