# SPDX-License-Identifier: Apache-2.0
"""torch operators of every entry point, for CUDA, CPU and fake tensors.

Registered with torch.library.Library: a call costs 3.5 us, against 24 us through the custom_op decorator. Plain CUDA
tensors outside every tracing mode take the functions of sagert.launch directly, which costs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sagert import cpu, launch
from sagert.errors import UnsupportedError
from sagert.options import SCHEMA
from sagert.plans import Keep

# Operators take their tensors and sizes, then SCHEMA's arguments. The number is where SCHEMA begins.
_QKV = "Tensor q, Tensor k, Tensor v, "
_ATTENTIONS = {
    "attention": (_QKV + "Tensor? mask, ", 4),
    "attention_varlen": (
        _QKV + "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, ",
        7,
    ),
    "attention_kv": (
        "Tensor q, Tensor kv, Tensor? v, Tensor? mask, SymInt heads_kv, SymInt seqlen_k, SymInt head_dim_v, int row, ",
        8,
    ),
}
_QUANTIZE_KV = "quantize_kv(Tensor k, Tensor v, int precision, bool smooth_k, int row, SymInt size) -> Tensor"
_RETURN_LSE = 4  # of SCHEMA
_unpack_dual: Any = forward_ad.unpack_dual
NO_TRANSFORM = "torch.func transforms (vmap, grad, jvp, ...)"


def empty_output(q: Tensor, head_dim_v: int) -> Tensor:
    """Uninitialised [B, H, S, Dv] (or packed [total_q, H, Dv]) in q's memory order of heads and sequence."""
    if q.dim() == 3:
        s, h, _ = q.shape
        if h > 1 and s > 1 and q.stride(0) < q.stride(1):
            return q.new_empty_strided((s, h, head_dim_v), (head_dim_v, s * head_dim_v, 1))
        return q.new_empty_strided((s, h, head_dim_v), (h * head_dim_v, head_dim_v, 1))
    b, h, s, _ = q.shape
    size = s * h * head_dim_v
    if h > 1 and s > 1 and q.stride(1) < q.stride(2):
        return q.new_empty_strided((b, h, s, head_dim_v), (size, head_dim_v, h * head_dim_v, 1))
    return q.new_empty_strided((b, h, s, head_dim_v), (size, s * head_dim_v, head_dim_v, 1))


def empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    """Uninitialised fp32 [B, H, S] (packed: [H, total_q]), or [0] where it was not asked for."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return q.new_empty(shape if return_lse else (0,), dtype=torch.float32)


def _head_dim_v(name: str, arguments: tuple[Any, ...]) -> int:
    size: int = arguments[6] if name == "attention_kv" else arguments[2].shape[-1]
    return size


# What says that no tracing or transforming mode looks on. Absent in some torch: then every call is an operator call.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled: Any = getattr(torch._C, "_is_any_autocast_enabled", partial(torch.is_autocast_enabled, "cuda"))
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
        and not (q.is_neg() or k.is_neg() or v.is_neg())  # a lazily negated view: its memory has the other sign
    )


def is_plain(tensors: tuple[Tensor, ...], half: bool) -> bool:
    """is_direct, and no autocast or gradients, which a Plan does not know of; its key says that they are on CUDA."""
    if (
        not _HAS_DIRECT
        or _dispatch_modes() != 0
        or _transforms() is not None
        or _is_autocast_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    grad = _is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor or (grad and tensor.requires_grad):
            return False
        if half and tensor.is_neg():  # no complex type has bf16 parts
            return False
    return True


def keep(key: Any, **what: Any) -> Keep | None:
    """Keep of a call that is about to be made, unless it has no key or a state that no Plan knows of decides it too.

    Under autocast, say, the tensors launched are casts of those that the key describes.
    """
    return None if key is None or not is_plain((), half=False) else Keep(key, **what)


def in_transform() -> bool:
    """Whether a torch.func transform runs this call."""
    return not torch.compiler.is_compiling() and _transforms is not None and _transforms() is not None


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation looks on one of the tensors."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(_unpack_dual(t).tangent is not None for t in tensors)


def call(name: str, out: Tensor | None, *arguments: Any, **direct: Any) -> tuple[Tensor, Tensor | None]:
    """An operator by its name, directly where nothing looks on; into `out` where it is given: (result, LSE)."""
    q, k, v = arguments[0], arguments[1], arguments[2]
    if is_direct(q, k, q if v is None else v):
        start = _ATTENTIONS[name][1]
        if out is None:
            out = empty_output(q, _head_dim_v(name, arguments))
        lse = empty_lse(q, True) if arguments[start + _RETURN_LSE] else None
        getattr(launch, name)(out, lse, *arguments, **direct)
        return out, lse
    if out is None:
        result: tuple[Tensor, Tensor] = getattr(torch.ops.sagert, name)(*arguments)
        return result
    return out, getattr(torch.ops.sagert, name + "_out")(out, *arguments)


def _returning(name: str, run: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The implementation of an operator that computes with `run`."""
    start = _ATTENTIONS[name][1]

    def function(*arguments: Any) -> tuple[Tensor, Tensor]:
        q = arguments[0]
        out = empty_output(q, _head_dim_v(name, arguments))
        lse = empty_lse(q, arguments[start + _RETURN_LSE])
        run(out, lse, *arguments)
        return out, lse

    return function


def _writing(name: str, run: Callable[..., None]) -> Callable[..., Tensor]:
    """The implementation of an operator's out variant that computes with `run`."""
    start = _ATTENTIONS[name][1]

    def function(out: Tensor, *arguments: Any) -> Tensor:
        lse = empty_lse(arguments[0], arguments[start + _RETURN_LSE])
        run(out, lse, *arguments)
        return lse

    return function


def _run_fake(*_: Any) -> None:
    """Shapes only."""


def _fake_quantize_kv(k: Tensor, v: Tensor, precision: int, smooth_k: bool, row: int, size: int) -> Tensor:
    return k.new_empty(size, dtype=torch.uint8)


def _refuse_vmap(*_: Any) -> Any:
    raise UnsupportedError(
        f"{NO_TRANSFORM} are not served: give the mapped dimension as the batch dimension, or call it outside"
    )


def _refuse_gradients(operator: Any) -> Callable[..., Any]:
    """The autograd implementation of an operator: there is no backward, so it refuses what would need one."""

    def function(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            raise UnsupportedError(
                "an input requires grad and backward is not implemented: call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return function


# The output's strides follow q's, so compiled code must hand over tensors in the order it traced.
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_torch_library: Any = torch.library
_library = _torch_library.Library("sagert", "DEF")


def _register(name: str, schema: str, implementations: dict[str, Callable[..., Any]], fake: Callable[..., Any]) -> None:
    _library.define(schema, tags=_TAGS)
    for key, function in implementations.items():
        _library.impl(name, function, key)
    _library.impl(name, _refuse_gradients(getattr(torch.ops.sagert, name).default), "Autograd")
    _library.impl(name, fake, "Meta")  # for fake tensors too; register_fake costs 2 ms of import time each
    _library.impl(name, _refuse_vmap, "FuncTorchBatched")


for _name, (_inputs, _) in _ATTENTIONS.items():
    for _suffix, _wrap, _first, _result in (
        ("", _returning, "", "(Tensor, Tensor)"),
        ("_out", _writing, "Tensor(a!) out, ", "Tensor"),
    ):
        _register(
            _name + _suffix,
            f"{_name}{_suffix}({_first}{_inputs}{SCHEMA}) -> {_result}",
            {"CUDA": _wrap(_name, getattr(launch, _name)), "CPU": _wrap(_name, getattr(cpu, _name))},
            _wrap(_name, _run_fake),
        )
_register("quantize_kv", _QUANTIZE_KV, {"CUDA": launch.quantize_kv, "CPU": cpu.quantize_kv}, _fake_quantize_kv)
