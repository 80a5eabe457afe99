# SPDX-License-Identifier: Apache-2.0
"""Form of a call: ranks, dtypes, devices, sizes that must agree whatever the kernel; the registry decides the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sagert.errors import InvalidArgumentError
from sagert.kv import QuantizedKV

LAYOUTS = ("BHSD", "BSHD")
MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
PACKED = "total, heads, head dim"


def check_layout(layout: str) -> None:
    """`layout` is one of LAYOUTS."""
    if layout not in LAYOUTS:
        raise InvalidArgumentError(f"layout={layout!r} is not a layout: use 'BHSD' or 'BSHD'")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of Q K^T: `scale`, or head_dim ** -0.5."""
    if scale is None:
        return head_dim**-0.5 if head_dim else 1.0
    if not isinstance(scale, int | float | torch.SymFloat) or not math.isfinite(scale):
        raise InvalidArgumentError(f"scale={scale!r}: give a finite number or None")
    return scale


def check_dropout(dropout_p: float) -> None:
    """`dropout_p` is a probability."""
    if not isinstance(dropout_p, int | float) or not 0.0 <= dropout_p <= 1.0:
        raise InvalidArgumentError(f"dropout_p={dropout_p!r}: give a probability between 0 and 1")


def _check_tensors(tensors: dict[str, Any], rank: int, axes: str, first: str) -> None:
    """Dense tensors of one rank, dtype and device."""
    lead: Any = tensors[first]
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedKV) or not isinstance(tensor, Tensor):
            raise InvalidArgumentError(f"{name} is a {type(tensor).__name__}: give a torch.Tensor")
        if tensor.dim() != rank:
            hint = f"; {name}.unsqueeze(0) adds a batch" if rank == 4 and tensor.dim() == 3 else ""
            raise InvalidArgumentError(
                f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}: give {rank}, {axes}{hint}"
            )
        if tensor.dtype != lead.dtype:
            raise InvalidArgumentError(f"{name} has dtype {tensor.dtype} but {first} has {lead.dtype}: give one dtype")
        if tensor.device != lead.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device} but {first} is on {lead.device}: give one device")
        if tensor.layout != torch.strided:
            raise InvalidArgumentError(f"{name} has layout {tensor.layout}: give a dense tensor")


def _check_heads(query_heads: int, key_heads: int, enable_gqa: bool) -> None:
    if query_heads == key_heads:
        return
    if not enable_gqa:
        raise InvalidArgumentError(
            f"q has {query_heads} heads and k has {key_heads}: pass enable_gqa=True to share each key head"
        )
    if key_heads == 0 or query_heads % key_heads:
        raise InvalidArgumentError(
            f"q has {query_heads} heads and k has {key_heads}: q's number must be a multiple of k's"
        )


def _check_head_dims(q: int, k: int) -> None:
    if q != k:
        raise InvalidArgumentError(f"head dims of q and k are {q} and {k}: they must be equal")


def check_qkv(q: Any, k: Any, v: Any, layout: str, enable_gqa: bool) -> None:
    """q, k and v of attention(), in `layout`."""
    axes = ", ".join(layout)
    _check_tensors({"q": q, "k": k, "v": v}, 4, axes, "q")
    heads, length = (2, 1) if layout == "BSHD" else (1, 2)
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise InvalidArgumentError(
            f"batch sizes of q, k, v are {q.shape[0]}, {k.shape[0]}, {v.shape[0]}: they must be equal"
        )
    _check_head_dims(q.shape[3], k.shape[3])
    check_values(k, v, heads, length)
    _check_heads(q.shape[heads], k.shape[heads], enable_gqa)


def check_values(k: Tensor, v: Tensor, heads: int, length: int) -> None:
    """k and v have as many heads and keys."""
    if v.shape[heads] != k.shape[heads] or v.shape[length] != k.shape[length]:
        raise InvalidArgumentError(
            f"k is {tuple(k.shape)} and v is {tuple(v.shape)}: heads and sequence lengths must be equal"
        )


def check_kv(k: Any, v: Any, layout: str) -> None:
    """k and v of quantize_kv(), in `layout`."""
    _check_tensors({"k": k, "v": v}, 4, ", ".join(layout), "k")
    if k.shape[0] != v.shape[0]:
        raise InvalidArgumentError(f"batch sizes of k and v are {k.shape[0]} and {v.shape[0]}: they must be equal")
    heads, length = (2, 1) if layout == "BSHD" else (1, 2)
    check_values(k, v, heads, length)


def check_quantized(q: Any, kv: QuantizedKV, v: Any, layout: str, precision: str, enable_gqa: bool) -> None:
    """q of attention() over a QuantizedKV, in `layout`."""
    if v is not None:
        raise InvalidArgumentError("v was given with a QuantizedKV, which holds the values: leave v out")
    _check_tensors({"q": q}, 4, ", ".join(layout), "q")
    if q.dtype != kv.dtype:
        raise InvalidArgumentError(f"q has dtype {q.dtype} but the QuantizedKV was made of {kv.dtype}: give that dtype")
    if q.device != kv.device:
        raise InvalidArgumentError(f"q is on {q.device} but the QuantizedKV is on {kv.device}: give one device")
    b, heads_kv, _, d = kv.shape
    if q.shape[0] != b:
        raise InvalidArgumentError(f"q has batch size {q.shape[0]} but the QuantizedKV has {b}: they must be equal")
    _check_head_dims(q.shape[3], d)
    _check_heads(q.shape[2 if layout == "BSHD" else 1], heads_kv, enable_gqa)
    if precision not in ("auto", kv.precision):
        raise InvalidArgumentError(
            f'precision={precision!r} with a QuantizedKV of {kv.precision}: give "auto" or quantize again'
        )


def check_mask(mask: Any, device: torch.device, shape: tuple[int, int, int, int]) -> None:
    """attn_mask broadcasts to `shape`, [B, H, S, Sk]."""
    if not isinstance(mask, Tensor):
        raise InvalidArgumentError(f"attn_mask is a {type(mask).__name__}: give a torch.Tensor or None")
    if mask.dtype not in MASK_DTYPES:
        raise InvalidArgumentError(
            f"attn_mask has dtype {mask.dtype}: give torch.bool (True attends) or torch.float16, torch.bfloat16 or "
            "torch.float32 (added to the scaled scores)"
        )
    if mask.device != device:
        raise InvalidArgumentError(f"attn_mask is on {mask.device} but q is on {device}: give one device")
    if mask.layout != torch.strided:
        raise InvalidArgumentError(f"attn_mask has layout {mask.layout}: give a dense tensor")
    sizes = tuple(mask.shape)
    fits = len(sizes) <= 4 and all(
        size == 1 or size == whole for size, whole in zip(reversed(sizes), reversed(shape), strict=False)
    )
    if not fits:
        raise InvalidArgumentError(
            f"attn_mask has shape {sizes}: it must broadcast to [B, H, S, Sk] = {list(shape)}, in either layout"
        )


def check_packed(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, enable_gqa: bool
) -> None:
    """The arguments of attention_varlen(), as far as they show without a look into device memory."""
    _check_tensors({"q": q, "k": k, "v": v}, 3, PACKED, "q")
    _check_head_dims(q.shape[2], k.shape[2])
    check_values(k, v, 1, 0)
    _check_heads(q.shape[1], k.shape[1], enable_gqa)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise InvalidArgumentError(f"{name} is a {type(cu).__name__}: give an int32 torch.Tensor on {q.device}")
        if cu.dtype != torch.int32:
            raise InvalidArgumentError(f"{name} has dtype {cu.dtype}: give torch.int32")
        if cu.dim() != 1 or cu.shape[0] < 1:
            raise InvalidArgumentError(f"{name} has shape {tuple(cu.shape)}: give [sequences + 1], from 0 to the total")
        if cu.device != q.device:
            raise InvalidArgumentError(f"{name} is on {cu.device} but q is on {q.device}: give one device")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise InvalidArgumentError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0]} entries and cu_seqlens_k has {cu_seqlens_k.shape[0]}: "
            "give one more than there are sequences in each"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, bool | Tensor) or not hasattr(longest, "__index__"):
            raise InvalidArgumentError(f"{name} is {longest!r}: give an int, the longest sequence's length")
        if longest < 0:
            raise InvalidArgumentError(f"{name} is {longest}: it must be at least 0")


def validate_segments(name: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    """What `cu_seqlens` holds; waits for the device."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0:
        raise InvalidArgumentError(f"cu_seqlens_{name} begins with {starts[0]}: it must begin with 0")
    for i in range(len(starts) - 1):
        length = starts[i + 1] - starts[i]
        if length < 0:
            raise InvalidArgumentError(
                f"cu_seqlens_{name} falls from {starts[i]} to {starts[i + 1]} at entry {i + 1}: it must not descend"
            )
        if length > longest:
            raise InvalidArgumentError(
                f"max_seqlen_{name} is {longest}, but sequence {i} has length {length}: give the longest length"
            )
    if starts[-1] != total:
        raise InvalidArgumentError(
            f"cu_seqlens_{name} ends with {starts[-1]}: it must end with {total}, the packed length"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last that a tensor may touch."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def check_out(out: Any, shape: tuple[int, ...], q: Tensor, inputs: Mapping[str, Tensor | None], axes: str) -> None:
    """`out` fits `shape`, in the order of `axes`, and shares no memory with the inputs."""
    if not isinstance(out, Tensor):
        raise InvalidArgumentError(f"out is a {type(out).__name__}: give a torch.Tensor")
    if tuple(out.shape) != tuple(shape):
        raise InvalidArgumentError(f"out has shape {tuple(out.shape)} in the order {axes}: it must be {tuple(shape)}")
    if out.dtype != q.dtype or out.device != q.device:
        raise InvalidArgumentError(f"out is {out.dtype} on {out.device}: it must be {q.dtype} on {q.device}, as q is")
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidArgumentError("out requires grad: pass out.detach() or call under torch.no_grad()")
    if torch.compiler.is_compiling() or out.device.type == "meta":
        return
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise InvalidArgumentError("out is an expanded tensor whose elements share memory: pass out.contiguous()")
    storage = out.untyped_storage().data_ptr()
    for name, tensor in inputs.items():
        if tensor is None or tensor.untyped_storage().data_ptr() != storage:
            continue
        start, end = _extent(out)
        first, last = _extent(tensor)
        if start < last and first < end:
            raise InvalidArgumentError(f"out shares memory with {name}: give it memory of its own")
