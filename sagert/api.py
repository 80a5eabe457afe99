# SPDX-License-Identifier: Apache-2.0
"""attention(): the public function, its defaults and its checks of form."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from sagert import fallback as fallback_module
from sagert import ops
from sagert.codes import PRECISIONS, precision_code
from sagert.errors import InvalidArgumentError, UnsupportedError
from sagert.settings import SETTINGS

_AUTO = PRECISIONS[SETTINGS.precision or "auto"]


def _check_form(q: Tensor, k: Tensor, v: Tensor, layout: str, enable_gqa: bool) -> None:
    """Ranks, dtypes, devices and sizes that must agree whatever the kernel; the registry decides everything else."""
    heads, length = (2, 1) if layout == "BSHD" else (1, 2)
    try:
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        if (
            len(q_shape) == len(k_shape) == len(v_shape) == 4
            and q.dtype == k.dtype == v.dtype
            and q.device == k.device == v.device
            and q.layout == k.layout == v.layout == torch.strided
            and q_shape[0] == k_shape[0] == v_shape[0]
            and q_shape[3] == k_shape[3]
            and k_shape[1] == v_shape[1]
            and k_shape[2] == v_shape[2]
            and q_shape[heads] == k_shape[heads]
        ):
            return  # the common case, in one look
    except AttributeError:
        pass  # not a tensor: named below
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise InvalidArgumentError(f"{name} is a {type(tensor).__name__}: give a torch.Tensor")
        if tensor.dim() != 4:
            hint = f"; {name}.unsqueeze(0) adds a batch" if tensor.dim() == 3 else ""
            raise InvalidArgumentError(
                f"{name} has {tensor.dim()} dimensions {tuple(tensor.shape)}: give 4, {', '.join(layout)}{hint}"
            )
        if tensor.dtype != q.dtype:
            raise InvalidArgumentError(f"{name} has dtype {tensor.dtype} but q has {q.dtype}: give one dtype")
        if tensor.device != q.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device} but q is on {q.device}: give one device")
        if tensor.layout != torch.strided:
            raise InvalidArgumentError(f"{name} has layout {tensor.layout}: give a dense tensor")
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise InvalidArgumentError(
            f"batch sizes of q, k, v are {q.shape[0]}, {k.shape[0]}, {v.shape[0]}: they must be equal"
        )
    if k.shape[3] != q.shape[3]:
        raise InvalidArgumentError(f"head dims of q and k are {q.shape[3]} and {k.shape[3]}: they must be equal")
    if v.shape[heads] != k.shape[heads] or v.shape[length] != k.shape[length]:
        raise InvalidArgumentError(
            f"k is {tuple(k.shape)} and v is {tuple(v.shape)}: heads and sequence lengths must be equal"
        )
    query_heads, key_heads = q.shape[heads], k.shape[heads]
    if query_heads != key_heads:
        if not enable_gqa:
            raise InvalidArgumentError(
                f"q has {query_heads} heads and k has {key_heads}: pass enable_gqa=True to share each key head"
            )
        if key_heads == 0 or query_heads % key_heads:
            raise InvalidArgumentError(
                f"q has {query_heads} heads and k has {key_heads}: q's number must be a multiple of k's"
            )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last that a tensor may touch."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """`out` in the order B, H, S, D; it must fit and share no memory with the inputs."""
    if not isinstance(out, Tensor):
        raise InvalidArgumentError(f"out is a {type(out).__name__}: give a torch.Tensor")
    shape = (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    if tuple(out.shape) != shape:
        raise InvalidArgumentError(f"out has shape {tuple(out.shape)} in the order B, H, S, D: it must be {shape}")
    if out.dtype != q.dtype or out.device != q.device:
        raise InvalidArgumentError(f"out is {out.dtype} on {out.device}: it must be {q.dtype} on {q.device}, as q is")
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidArgumentError("out requires grad: pass out.detach() or call under torch.no_grad()")
    if torch.compiler.is_compiling() or out.device.type == "meta":
        return
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise InvalidArgumentError("out is an expanded tensor whose elements share memory: pass out.contiguous()")
    storage = out.untyped_storage().data_ptr()
    start, end = 0, 0
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.untyped_storage().data_ptr() != storage:
            continue
        start, end = _extent(out)
        first, last = _extent(tensor)
        if start < last and first < end:
            raise InvalidArgumentError(f"out shares memory with {name}: give it memory of its own")


def _refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    grad: bool,
    precision: str,
    return_lse: bool,
    smooth_k: bool,
) -> str:
    """The reasons against a mask, dropout or grad, which the operators cannot carry: on CUDA the library's."""
    asked = [
        name
        for name, present in (
            (f"attn_mask of shape {None if attn_mask is None else tuple(attn_mask.shape)}", attn_mask is not None),
            (f"dropout_p={dropout_p}", dropout_p > 0),
            ("a differentiable result (an input requires grad and backward is not implemented)", grad),
        )
        if present
    ]
    summary = "no kernel row serves " + " or ".join(asked)
    fixes = "drop attn_mask and dropout_p, or call under torch.no_grad()" if grad else "drop attn_mask and dropout_p"
    hint = f'{summary}: {fixes}, or pass fallback="sdpa"'
    if torch.compiler.is_compiling() or q.device.type != "cuda":
        return hint
    from sagert.registry import explain

    answer = explain(
        q, k, v, attn_mask, dropout_p, is_causal,
        precision=precision, return_lse=return_lse, smooth_k=smooth_k, requires_grad=grad,
    )  # fmt: skip
    return f"{hint}\n{answer}"


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ..., is_causal: bool = ...,
    scale: float | None = ..., enable_gqa: bool = ..., *, layout: str = ..., precision: str = ...,
    return_lse: Literal[False] = ..., out: Tensor | None = ..., smooth_k: bool = ..., fallback: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ..., is_causal: bool = ...,
    scale: float | None = ..., enable_gqa: bool = ..., *, layout: str = ..., precision: str = ...,
    return_lse: Literal[True], out: Tensor | None = ..., smooth_k: bool = ..., fallback: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "BHSD",
    precision: str = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
    smooth_k: bool = True,
    fallback: str = "error",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, softmax(scale * Q K^T) V, with quantized products.

    The first eight arguments are those of torch.nn.functional.scaled_dot_product_attention and mean the same.

    Args:
        q: queries [B, H, S, D], fp16 or bf16, any strides. Never modified; nor are k and v.
        k: keys [B, Hk, Sk, D], of q's dtype and device.
        v: values [B, Hk, Sk, Dv].
        attn_mask: refused unless a kernel row serves it (see `explain`).
        dropout_p: refused above 0.
        is_causal: query i sees keys 0 .. i (top-left aligned when S != Sk).
        scale: multiplies Q K^T; D ** -0.5 by default.
        enable_gqa: allow H to be a multiple of Hk.
        layout: "BHSD", or "BSHD" for q, k, v (and out) as [B, S, H, D].
        precision: number format of Q K^T, then of P V: "int8_fp16", "int8_fp8", ...; "auto" takes the best row of
            accuracy class high or standard. A named precision is never changed for another.
        return_lse: also return the log-sum-exp of the scaled scores: natural logarithm, fp32 [B, H, S] in both layouts.
        out: tensor to write into, of the result's shape, dtype and device; it may share no memory with the inputs.
        smooth_k: subtract K's mean over keys before quantizing (exact under softmax, and more accurate).
        fallback: "error", or "sdpa" to run scaled_dot_product_attention where no row can serve the call: decided before
            launch, warned about once per reason and counted by `stats`. Not with return_lse, which SDPA does not give.

    Returns:
        The result [B, H, S, Dv] in q's dtype and memory order, or (result, lse).

    Raises:
        InvalidArgumentError: a malformed call (a ValueError).
        UnsupportedError: no kernel row serves it; the message has every row's reasons (a NotImplementedError).
        NoDriverError, IntegrityError, CudaError, torch.OutOfMemoryError: as they say; these never fall back.

    On CUDA it runs on the current stream, does not synchronize and can be captured in a CUDA graph. CPU tensors run on
    the reference in torch, with the same arithmetic ("auto" is "int8_fp16" there): correct, not fast.
    """
    if layout != "BHSD" and layout != "BSHD":
        raise InvalidArgumentError(f"layout={layout!r} is not a layout: use 'BHSD' or 'BSHD'")
    _check_form(q, k, v, layout, enable_gqa)
    code = _AUTO if precision == "auto" else precision_code(precision)
    if scale is None:
        scale = q.shape[3] ** -0.5 if q.shape[3] else 1.0
    elif not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InvalidArgumentError(f"scale={scale!r}: give a finite number or None")
    if not 0.0 <= dropout_p <= 1.0:
        raise InvalidArgumentError(f"dropout_p={dropout_p!r}: give a probability between 0 and 1")
    sdpa = fallback_module.use_sdpa(fallback)
    if layout == "BSHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = out if out is None else out.transpose(1, 2)
    if out is not None:
        _check_out(out, q, k, v)

    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if attn_mask is not None or dropout_p > 0 or grad:
        reason = _refuse(q, k, v, attn_mask, dropout_p, is_causal, grad, precision, return_lse, smooth_k)
        if not sdpa or return_lse or (grad and out is not None):
            raise UnsupportedError(reason)
        if not torch.compiler.is_compiling():
            fallback_module.record(reason.split("\n", 1)[0])
        exact = ops.sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale)
        exact = exact if out is None else out.copy_(exact)
        return exact.transpose(1, 2) if layout == "BSHD" else exact

    result: Tensor
    lse: Tensor | None
    if ops.is_direct(q, k, v):
        result, lse = ops.attention_direct(q, k, v, out, scale, is_causal, code, smooth_k, return_lse, sdpa)
    elif out is None:
        result, lse = ops.attention(q, k, v, scale, is_causal, code, smooth_k, return_lse, sdpa)
    else:
        lse = ops.attention_out(q, k, v, out, scale, is_causal, code, smooth_k, return_lse, sdpa)
        result = out
    if layout == "BSHD":
        result = result.transpose(1, 2)
    return (result, lse) if return_lse else result  # type: ignore[return-value]
