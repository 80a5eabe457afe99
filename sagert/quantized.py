# SPDX-License-Identifier: Apache-2.0
"""quantize_kv(): quantizes keys and values once, for many calls of attention()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sagert import checks, cpu, launch, ops
from sagert.calls import autocast, differentiated, obstacles, precision_of, refuse
from sagert.codes import PRECISION_NAMES, dtype_code
from sagert.kv import QuantizedKV
from sagert.plans import PLANS, is_aligned, tensor_key

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ALIGNED = 256  # the address of a tensor that is not there yet: torch allocates at such ones


def _constant(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result without the import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _plan_traced(*arguments: Any) -> tuple[int, int, bool]:
    """The library's plan while torch.compile traces: it follows from shapes and device, which are constants then."""
    return launch.kv_plan(*arguments)


def _row_precision(row: int) -> str:
    from sagert.registry.rows import row_at

    return row_at(row).precision


@_constant
def _row_precision_traced(row: int) -> str:
    return _row_precision(row)


def _plan(k: Tensor, v: Tensor, code: int, smooth_k: bool, masked: bool, row: int) -> tuple[int, int, bool]:
    """(bytes, row, whether attention still reads V); row < 0 lets the registry choose."""
    if k.device.type != "cuda":
        return cpu.kv_plan(k, v, code)
    traced = torch.compiler.is_compiling()
    k_data, v_data = (_ALIGNED, _ALIGNED) if traced else (k.data_ptr(), v.data_ptr())
    arguments = (
        (k_data, *k.stride()), (v_data, *v.stride()), tuple(k.shape), v.shape[3], dtype_code(k.dtype), code, smooth_k,
        masked, row, k.device.index,
    )  # fmt: skip
    return _plan_traced(*arguments) if traced else launch.kv_plan(*arguments)


def quantize_kv(
    k: Tensor, v: Tensor, *, layout: str = "BHSD", precision: str = "auto", smooth_k: bool = True, masked: bool = False
) -> QuantizedKV:
    """Quantizes keys and values once; `attention(q, kv)` then equals `attention(q, k, v)` of that row bit for bit.

    Args:
        k: keys [B, Hk, Sk, D], fp16, bf16 or fp32, any strides; queries must have the same dtype. Not modified, and not
            kept: its memory may be freed or overwritten afterwards. Under torch.autocast k and v are cast.
        v: values [B, Hk, Sk, Dv], the same.
        layout: "BHSD", or "BSHD" for [B, S, H, D].
        precision: as in `attention`; "auto" chooses as for as many queries as there are keys.
        smooth_k: subtract K's mean over keys first.
        masked: choose a row that also serves attn_mask, window and bottom-right alignment.

    Returns:
        A QuantizedKV. It takes about Sk * (D + 4) bytes per batch and key head, and Sk * Dv more where the precision
        quantizes V (int8_fp8, int8_int8); with int8_fp16 a copy of V, Sk * Dv * 2. `QuantizedKV.nbytes` is exact.

    Raises:
        InvalidArgumentError, UnsupportedError, NoDriverError, IntegrityError, CudaError, torch.OutOfMemoryError: as
        `attention` does.
    """
    key: Any = None
    given = (k, v)
    if not torch.compiler.is_compiling():
        try:  # as in attention()
            key = ("quantize_kv", tensor_key(k), tensor_key(v), layout, precision, smooth_k, masked)
            plan = PLANS.by_key.get(key)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            key = plan = None
        if plan is not None and ops.is_plain(given, plan.half) and is_aligned(k, v):
            return QuantizedKV(plan.launch(given), None, *plan.details)

    checks.check_layout(layout)
    k, v = autocast(k, k, v)
    checks.check_kv(k, v, layout)
    code = precision_of(precision)
    if layout == "BSHD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    asked = obstacles(0.0, differentiated(k, v))
    if asked:
        refuse(asked, None, None, advice="")
    dtype = k.dtype
    smooth_k, masked = bool(smooth_k), bool(masked)
    k, v = launch.narrow(k, v)
    size, row, reads_v = _plan(k, v, code, smooth_k, masked, -1)
    copied = reads_v or k.dtype != dtype  # a Plan makes no copies
    kept = None
    if reads_v:  # the caller may overwrite its V, and the plan depends on how V may be read
        v = v.clone(memory_format=torch.contiguous_format)
        size, row, reads_v = _plan(k, v, code, smooth_k, masked, row)
        kept = v if reads_v else None
    if k.device.type != "cuda":
        name = cpu.precision_name(code)
    elif PRECISION_NAMES[code] != "auto":
        name = PRECISION_NAMES[code]
    else:
        name = (_row_precision_traced if torch.compiler.is_compiling() else _row_precision)(row)
    code = precision_of(name)
    b, h, s, d = k.shape
    details = ((b, h, s, d), v.shape[3], dtype, name, row, smooth_k, masked)
    if ops.is_direct(k, v, v):
        keep = None if copied else ops.keep(key, details=details)
        data = launch.quantize_kv(k, v, code, smooth_k, row, size, keep=keep)
    else:
        data = torch.ops.sagert.quantize_kv(k, v, code, smooth_k, row, size)
    return QuantizedKV(data, kept, *details)
