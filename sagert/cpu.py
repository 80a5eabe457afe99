# SPDX-License-Identifier: Apache-2.0
"""CPU tensors: the reference, with the kernels' arithmetic, for every precision that has one; auto is int8_fp16."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sagert import codes, fallback, sdpa
from sagert.errors import UnsupportedError
from sagert.options import Options

NO_ROW = -1


def _reference() -> ModuleType:
    from sagert import reference  # not for those who only compute on GPUs

    return reference


def _reference_kv() -> ModuleType:
    from sagert import reference_kv

    return reference_kv


def precision_name(precision: int) -> str:
    """The precision that a number means on the CPU."""
    name = codes.PRECISION_NAMES.get(precision, str(precision))
    return "int8_fp16" if name == "auto" else name


def _refusal(precision: int, *tensors: Tensor | None) -> str | None:
    """Why the reference cannot serve these inputs; None where it can."""
    name = precision_name(precision)
    reference = _reference()
    given = [t for t in tensors if t is not None]
    if name not in reference.PRECISIONS:
        accepted = ", ".join(repr(p) for p in reference.PRECISIONS)
        return f"precision={name!r} on the CPU: the reference of CPU tensors has no such recipe; use one of {accepted}"
    if given[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q has dtype {given[0].dtype}: cast to torch.float16 or torch.bfloat16 (fp32 is computed through bf16)"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "an input requires grad and backward is not implemented: call it under torch.no_grad()"
    return None


def _narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.bfloat16) if t.dtype is torch.float32 else t for t in tensors)


def _into(
    out: Tensor,
    lse: Tensor | None,
    options: Options,
    reason: str | None,
    run: Callable[[], tuple[Tensor, Tensor]],
    exact: Callable[[], Tensor] | None,
) -> None:
    """Fills out and lse by `run`, or out by `exact` where there is a reason against and a fallback was asked for."""
    if reason is not None:
        if exact is None or not options.fallback_sdpa or options.return_lse:
            raise UnsupportedError(reason)
        fallback.record(reason)
        out.copy_(exact())
        return
    result, result_lse = run()
    out.copy_(result)
    if lse is not None and options.return_lse:
        lse.copy_(result_lse)


def _request(options: Options) -> dict[str, Any]:
    return {
        "is_causal": options.is_causal,
        "scale": options.scale,
        "precision": precision_name(options.precision),
        "smooth_k": options.smooth_k,
        "window": (options.window_left, options.window_right),
        "causal_alignment": "bottom_right" if options.bottom_right else "top_left",
    }


def attention(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
) -> None:
    """As launch.attention."""
    options = Options(*rest)
    _into(
        out,
        lse,
        options,
        _refusal(options.precision, q, k, v),
        lambda: _reference().attention(*_narrow(q, k, v), attn_mask=mask, **_request(options)),
        lambda: sdpa.attention(q, k, v, mask, 0.0, options.pattern, options.scale),
    )


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
    """As launch.attention_varlen."""
    options = Options(*rest)
    del max_seqlen_q, max_seqlen_k  # the lengths themselves are at hand

    def run() -> tuple[Tensor, Tensor]:
        q16, k16, v16 = _narrow(q, k, v)
        result: tuple[Tensor, Tensor] = _reference().attention_varlen(
            q16, k16, v16, cu_seqlens_q, cu_seqlens_k, **_request(options)
        )
        return result

    _into(
        out,
        lse,
        options,
        _refusal(options.precision, q, k, v),
        run,
        lambda: sdpa.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, options.pattern, options.scale),
    )


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
    """As launch.attention_kv."""
    options = Options(*rest)
    del row  # there is one recipe here

    def run() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _reference_kv().attend(
            _narrow(q)[0], data, v, heads_kv, seqlen_k, head_dim_v,
            precision=precision_name(options.precision), seen=options.pattern, scale=options.scale, attn_mask=mask,
        )  # fmt: skip
        return result

    _into(out, lse, options, _refusal(options.precision, q, v), run, None)


def kv_plan(k: Tensor, v: Tensor, precision: int) -> tuple[int, int, bool]:
    """As launch.kv_plan."""
    reason = _refusal(precision, k, v)
    if reason is not None:
        raise UnsupportedError(reason)
    b, h, s, d = k.shape
    name = precision_name(precision)
    return _reference_kv().kv_bytes(b, h, s, d, v.shape[3], name), NO_ROW, name == "int8_fp16"


def quantize_kv(k: Tensor, v: Tensor, precision: int, smooth_k: bool, row: int, size: int) -> Tensor:
    """As launch.quantize_kv."""
    del row, size
    data: Tensor = _reference_kv().quantize_kv(*_narrow(k, v), precision=precision_name(precision), smooth_k=smooth_k)
    return data
