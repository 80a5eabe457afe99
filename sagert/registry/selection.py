# SPDX-License-Identifier: Apache-2.0
"""explain(): which row serves a call, or why each one does not. A pure question: needs no GPU."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import Any

from sagert import codes, errors, native
from sagert.kv import QuantizedKV
from sagert.registry.device import Device, current_device, device_at, parse_capability
from sagert.settings import SETTINGS
from sagert.visibility import pattern


@dataclass(frozen=True)
class Selection:
    """Answer of explain(): the row that would run (None if none), and every row's reasons against.

    `reasons` maps row id -> texts (empty for the rows that would do); `nearest` is the row with the fewest reasons and
    `hint` the smallest change that would make it run. True exactly when a row was found.
    """

    row: str | None
    reasons: dict[str, tuple[str, ...]]
    nearest: str | None
    hint: str | None
    request: dict[str, Any]
    device: dict[str, Any]

    def __bool__(self) -> bool:
        return self.row is not None

    def __str__(self) -> str:
        if self.row is not None:
            lines = [f"selected: {self.row}"]
        else:
            lines = ["no kernel row can serve this"]
            if self.nearest:
                lines.append(f"nearest: {self.nearest}")
            if self.hint:
                lines.append(f"hint: {self.hint}")
        for row, reasons in self.reasons.items():
            lines.append(f"  {row}: {'; '.join(reasons) if reasons else 'yes'}")
        return "\n".join(lines)


def ask(request: native.Request, device: native.DeviceStruct) -> Selection:
    """sagert_explain, parsed."""
    explain_native = native.library().sagert_explain
    need = ctypes.c_uint64()
    arguments = (ctypes.byref(request), ctypes.byref(device))
    status = explain_native(*arguments, None, 0, ctypes.byref(need))
    if status not in (native.OK, native.UNSUPPORTED):
        raise native.error(status)
    buffer = ctypes.create_string_buffer(need.value)
    status = explain_native(*arguments, buffer, need.value, ctypes.byref(need))
    if status not in (native.OK, native.UNSUPPORTED):
        raise native.error(status)
    data = json.loads(buffer.value)
    return Selection(
        row=data["selected"],
        reasons={row["id"]: tuple(reason["text"] for reason in row["reasons"]) for row in data["rows"]},
        nearest=data.get("nearest"),
        hint=data.get("hint"),
        request=data["request"],
        device=data["device"],
    )


def _shape(name: str, value: Any, layout: str) -> tuple[int, int, int, int]:
    shape = tuple(int(size) for size in getattr(value, "shape", value))
    if len(shape) != 4:
        raise errors.InvalidArgumentError(f"{name} has {len(shape)} dimensions {shape}: give 4, {', '.join(layout)}")
    if layout == "BSHD":
        shape = (shape[0], shape[2], shape[1], shape[3])
    return shape[0], shape[1], shape[2], shape[3]


def _device(device: Any, query: Any) -> Device:
    if isinstance(device, Device):
        return device
    if device is not None:
        if isinstance(device, int) and not isinstance(device, bool):
            return device_at(device)
        if isinstance(device, str | float | tuple):
            return Device(parse_capability(device))
        raise errors.InvalidArgumentError(
            f"device={device!r}: give a sagert.Device, a capability such as '9.0', or a CUDA ordinal"
        )
    place = getattr(query, "device", None)
    if getattr(place, "type", None) == "cuda" and place is not None and place.index is not None:
        return device_at(place.index)
    return current_device()


def explain(
    q: Any,
    k: Any = None,
    v: Any = None,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "BHSD",
    precision: str = "auto",
    return_lse: bool = False,
    out: Any = None,
    smooth_k: bool = True,
    fallback: str = "error",
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    varlen: bool = False,
    dtype: Any = None,
    requires_grad: bool | None = None,
    device: Device | str | float | tuple[int, int] | int | None = None,
) -> Selection:
    """Which kernel row would run this attention on a device, or every row's reasons why not.

    q, k, v are tensors (meta tensors too) or shapes in `layout`; k defaults to q and v to k, and k may be a
    QuantizedKV. attn_mask is a tensor, True, or the name of a dtype ("bool", "float32", ...). varlen asks for
    `attention_varlen`: q is then (N, H, longest, D), and k and v likewise. dtype defaults to q's, or bf16 for a shape;
    fp32 is explained as bf16, which it is computed through. device is a Device, a capability ("9.0", with a current
    driver), or a CUDA ordinal; by default q's or the current one. The other arguments are those of `attention`. Raises
    InvalidArgumentError for a malformed call and NoDriverError when there is no driver and device was not given. Runs
    nothing.
    """
    del scale, enable_gqa, out, fallback  # accepted so that a call can be explained with its own arguments
    if layout not in ("BHSD", "BSHD"):
        raise errors.InvalidArgumentError(f"layout={layout!r} is not a layout: use 'BHSD' or 'BSHD'")
    quantized = k if isinstance(k, QuantizedKV) else None
    batch, heads, seqlen_q, dim = _shape("q", q, layout)
    if quantized is None:
        k = q if k is None else k
        v = k if v is None else v
        _, heads_kv, seqlen_k, _ = _shape("k", k, layout)
        dim_v = _shape("v", v, layout)[3]
    else:
        _, heads_kv, seqlen_k, _ = quantized.shape
        dim_v = quantized.head_dim_v
        smooth_k, precision = quantized.smooth_k, quantized.precision
    if requires_grad is None:
        requires_grad = any(getattr(tensor, "requires_grad", False) for tensor in (q, k, v))
    seen = pattern(is_causal, window, causal_alignment)
    has_window = seen.window_left >= 0 or seen.window_right >= 0
    has_mask = attn_mask is not None and attn_mask is not False
    asked = {
        codes.FLAG_CAUSAL: is_causal,
        codes.FLAG_LSE: return_lse,
        codes.FLAG_MASK: has_mask,
        codes.FLAG_DROPOUT: dropout_p,
        codes.FLAG_GRAD: requires_grad,
        codes.FLAG_NO_SMOOTH_K: not smooth_k,
        codes.FLAG_VARLEN: varlen,
        codes.FLAG_WINDOW: has_window,
        codes.FLAG_BOTTOM_RIGHT: seen.bottom_right and (is_causal or has_window),
        codes.FLAG_QUANTIZED_KV: quantized is not None,
    }
    if dtype is None:
        dtype = getattr(q, "dtype", "bfloat16")
    code = codes.dtype_code(dtype)
    if precision == "auto" and SETTINGS.precision is not None:
        precision = SETTINGS.precision
    mask = "bool" if attn_mask is True else attn_mask if isinstance(attn_mask, str) else getattr(attn_mask, "dtype", "")
    request = native.Request(
        batch=batch,
        heads_q=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=dim,
        head_dim_v=dim_v,
        dtype=codes.DTYPES["bfloat16"] if code == codes.DTYPES["float32"] else code,
        precision=codes.precision_code(precision),
        flags=sum(flag for flag, wanted in asked.items() if wanted),
        mask_dtype=codes.mask_dtype_code(mask) if has_mask else 0,
        window_left=seen.window_left if has_window else 0,
        window_right=seen.window_right if has_window else 0,
        row=0 if quantized is None else quantized.row + 1,
    )
    return ask(request, _device(device, q).to_native())
