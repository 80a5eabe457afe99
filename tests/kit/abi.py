# SPDX-License-Identifier: Apache-2.0
"""The C ABI in ctypes, written from include/sagert.h independently of the package's own binding."""

from __future__ import annotations

import ctypes
import json
from ctypes import c_char, c_char_p, c_double, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

OK, INVALID_ARGUMENT, UNSUPPORTED, NO_DRIVER, INTEGRITY, CUDA, OUT_OF_MEMORY, INTERNAL = range(8)
FP16, BF16, FP32, BOOL = 1, 2, 3, 4
AUTO, INT8_FP16, INT8_FP8, INT8_INT8, INT4_FP8, NVFP4, INT4_FP16, INT4_INT8 = range(8)
CAUSAL, LSE, MASK, DROPOUT, GRAD, NO_SMOOTH_K, VARLEN, WINDOW, BOTTOM_RIGHT, QUANTIZED_KV = (1 << i for i in range(10))


class _Sized(ctypes.Structure):
    def __init__(self, **values: Any) -> None:
        super().__init__(**{"struct_size": ctypes.sizeof(self), **values})


class Request(_Sized):
    _fields_ = [
        ("struct_size", c_uint64), ("batch", c_int64), ("heads_q", c_int64), ("heads_kv", c_int64),
        ("seqlen_q", c_int64), ("seqlen_k", c_int64), ("head_dim", c_int64), ("head_dim_v", c_int64),
        ("dtype", c_int32), ("precision", c_int32), ("flags", c_uint32), ("mask_dtype", c_int32),
        ("window_left", c_int64), ("window_right", c_int64), ("row", c_int32), ("reserved", c_uint32),
    ]  # fmt: skip


class Device(_Sized):
    _fields_ = [
        ("struct_size", c_uint64), ("ordinal", c_int32), ("capability", c_int32), ("driver_version", c_int32),
        ("multiprocessors", c_int32), ("shared_memory", c_int32), ("reserved", c_int32), ("memory", c_int64),
        ("name", c_char * 128), ("uuid", c_uint8 * 16),
    ]  # fmt: skip


class Row(_Sized):
    _fields_ = [
        ("struct_size", c_uint64), ("id", c_char_p), ("bundle", c_char_p), ("family", c_char_p),
        ("precision", c_int32), ("accuracy", c_int32), ("rank", c_int32), ("capability_min", c_int32),
        ("capability_max", c_int32), ("driver_min", c_int32), ("flags", c_uint32), ("dtypes", c_uint32),
        ("head_dim_max", c_int64), ("rel_l1_randn", c_double), ("axes_json", c_char_p), ("quant_json", c_char_p),
    ]  # fmt: skip


class Bundle(_Sized):
    _fields_ = [
        ("struct_size", c_uint64), ("name", c_char_p), ("target", c_char_p), ("toolkit", c_char_p), ("path", c_char_p),
        ("driver_min", c_int32), ("kernel_count", c_int32), ("bytes", c_int64),
    ]  # fmt: skip


class Selection(_Sized):
    _fields_ = [("struct_size", c_uint64), ("row", c_int32), ("variant", c_int32)]


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4)]


class AttentionArgs(_Sized):
    _fields_ = [
        ("struct_size", c_uint64), ("batch", c_int64), ("heads_q", c_int64), ("heads_kv", c_int64),
        ("seqlen_q", c_int64), ("seqlen_k", c_int64), ("head_dim", c_int64), ("head_dim_v", c_int64),
        ("q", Tensor), ("k", Tensor), ("v", Tensor), ("out", Tensor), ("lse", c_void_p), ("workspace", c_void_p),
        ("workspace_size", c_uint64), ("stream", c_void_p), ("scale", c_double), ("dtype", c_int32),
        ("precision", c_int32), ("flags", c_uint32), ("device", c_int32), ("mask", Tensor), ("mask_dtype", c_int32),
        ("row", c_int32), ("window_left", c_int64), ("window_right", c_int64), ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p), ("total_q", c_int64), ("total_k", c_int64), ("kv", c_void_p), ("kv_size", c_uint64),
    ]  # fmt: skip


class KvInfo(_Sized):
    _fields_ = [("struct_size", c_uint64), ("bytes", c_uint64), ("row", c_int32), ("reads_v", c_int32)]


STRUCTS = {
    "sagert_request": Request, "sagert_device": Device, "sagert_row": Row, "sagert_bundle": Bundle,
    "sagert_selection": Selection, "sagert_tensor": Tensor, "sagert_attention_args": AttentionArgs,
    "sagert_kv_info": KvInfo,
}  # fmt: skip


def request(**values: Any) -> Request:
    """A small causal-free bf16 request, changed by `values`."""
    base: dict[str, Any] = {"batch": 2, "heads_q": 8, "heads_kv": 4, "seqlen_q": 1000, "seqlen_k": 1100}
    base |= {"head_dim": 128, "dtype": BF16, "precision": AUTO}
    base |= values
    base.setdefault("head_dim_v", base["head_dim"])
    return Request(**base)


def device(capability: int = 90, driver: int = 12090, **values: Any) -> Device:
    """A device described by its capability and its driver's CUDA version."""
    base: dict[str, Any] = {"capability": capability, "driver_version": driver, "multiprocessors": 100}
    return Device(**(base | {"shared_memory": 232448, "memory": 80 << 30, "name": b"Invented GPU"} | values))


def contiguous(shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    _, h, s, d = shape
    return (h * s * d, s * d, d, 1)


def attention_args(**values: Any) -> AttentionArgs:
    """Arguments with contiguous tensors at invented, aligned addresses: nothing reads them under the stub driver."""
    base: dict[str, Any] = {"batch": 2, "heads_q": 8, "heads_kv": 4, "seqlen_q": 1000, "seqlen_k": 1100}
    base |= {"head_dim": 128, "dtype": BF16, "precision": AUTO, "scale": 0.125, "workspace": 1 << 40}
    base |= {"workspace_size": 1 << 40, "lse": 5 << 32, "stream": 0x77}
    base |= values
    base.setdefault("head_dim_v", base["head_dim"])
    b, h, hk, s, sk = (base[n] for n in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k"))
    d, dv = base["head_dim"], base["head_dim_v"]
    shapes = {"q": (b, h, s, d), "k": (b, hk, sk, d), "v": (b, hk, sk, dv), "out": (b, h, s, dv)}
    for i, (name, shape) in enumerate(shapes.items(), 1):
        address, strides = base.get(name, (None, None))
        base[name] = Tensor(address or i << 32, (c_int64 * 4)(*(strides or contiguous(shape))))
    return AttentionArgs(**base)


class Library:
    """libsagert with checked calls."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.c = ctypes.CDLL(str(path))
        self.c.sagert_version.restype = c_char_p
        self.c.sagert_abi_version.restype = c_uint32
        self.c.sagert_last_error.restype = c_char_p

    def error(self) -> str:
        """Message of this thread's last failed call."""
        return self.c.sagert_last_error().decode()

    def select(self, req: Request, dev: Device) -> tuple[int, Selection]:
        """Status and selection."""
        selection = Selection()
        return self.c.sagert_select(ctypes.byref(req), ctypes.byref(dev), ctypes.byref(selection)), selection

    def explain(self, req: Request, dev: Device) -> dict[str, Any]:
        """The document of sagert_explain; raises ValueError with the message when it fails."""
        required = c_uint64()
        status = self.c.sagert_explain(ctypes.byref(req), ctypes.byref(dev), None, c_uint64(0), ctypes.byref(required))
        if status != OK:
            raise ValueError(self.error())
        buffer = ctypes.create_string_buffer(required.value)
        self.c.sagert_explain(ctypes.byref(req), ctypes.byref(dev), buffer, required, None)
        return json.loads(buffer.value)

    def rows(self) -> list[Row]:
        """All kernel rows."""
        rows = [Row() for _ in range(self.c.sagert_row_count())]
        for i, row in enumerate(rows):
            if self.c.sagert_row_get(i, ctypes.byref(row)) != OK:
                raise ValueError(self.error())
        return rows

    def bundles(self) -> list[tuple[str, str]]:
        """Name and folder of all bundles."""
        out = []
        for i in range(self.c.sagert_bundle_count()):
            bundle = Bundle()
            if self.c.sagert_bundle_get(i, ctypes.byref(bundle)) != OK:
                raise ValueError(self.error())
            out.append((bundle.name.decode(), bundle.path.decode()))
        return out

    def attention(self, args: AttentionArgs, function: str = "sagert_attention") -> int:
        """Status of an attention call."""
        return getattr(self.c, function)(ctypes.byref(args))

    def workspace_size(self, args: AttentionArgs) -> tuple[int, int]:
        """Status and bytes."""
        size = c_uint64()
        return self.c.sagert_workspace_size(ctypes.byref(args), ctypes.byref(size)), size.value

    def kv_plan(self, args: AttentionArgs) -> tuple[int, KvInfo]:
        """Status and what K and V take when they are quantized once."""
        info = KvInfo()
        return self.c.sagert_kv_plan(ctypes.byref(args), ctypes.byref(info)), info
