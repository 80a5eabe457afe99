# SPDX-License-Identifier: Apache-2.0
"""ctypes binding of include/sagert.h.

The library is loaded on first use, by absolute path from lib/ beside this file and from nowhere else. The hot call
passes the address of one struct: 0.4 us, against 3.4 us for thirty ctypes arguments.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path
from typing import Any

from sagert import errors

ABI_VERSION = 1
PACKAGE = Path(__file__).resolve().parent
LIBRARY_NAME = {"win32": "sagert.dll", "darwin": "libsagert.dylib"}.get(sys.platform, "libsagert.so")

OK, INVALID_ARGUMENT, UNSUPPORTED, NO_DRIVER, INTEGRITY, CUDA, OUT_OF_MEMORY, INTERNAL = range(8)
_ERRORS: dict[int, type[errors.SagertError]] = {
    INVALID_ARGUMENT: errors.InvalidArgumentError,
    UNSUPPORTED: errors.UnsupportedError,
    NO_DRIVER: errors.NoDriverError,
    INTEGRITY: errors.IntegrityError,
    CUDA: errors.CudaError,
    INTERNAL: errors.InternalError,
}


class Sized(ctypes.Structure):
    """A struct whose first field is its own size, filled in on construction."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(ctypes.sizeof(type(self)), **fields)


class Request(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("batch", ctypes.c_int64),
        ("heads_q", ctypes.c_int64),
        ("heads_kv", ctypes.c_int64),
        ("seqlen_q", ctypes.c_int64),
        ("seqlen_k", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("head_dim_v", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("mask_dtype", ctypes.c_int32),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("row", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
    ]


class DeviceStruct(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("ordinal", ctypes.c_int32),
        ("capability", ctypes.c_int32),
        ("driver_version", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_memory", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("memory", ctypes.c_int64),
        ("name", ctypes.c_char * 128),
        ("uuid", ctypes.c_uint8 * 16),
    ]


class RowStruct(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("id", ctypes.c_char_p),
        ("bundle", ctypes.c_char_p),
        ("family", ctypes.c_char_p),
        ("precision", ctypes.c_int32),
        ("accuracy", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("capability_min", ctypes.c_int32),
        ("capability_max", ctypes.c_int32),
        ("driver_min", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("dtypes", ctypes.c_uint32),
        ("head_dim_max", ctypes.c_int64),
        ("rel_l1_randn", ctypes.c_double),
        ("axes_json", ctypes.c_char_p),
        ("quant_json", ctypes.c_char_p),
    ]


class BundleStruct(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
        ("toolkit", ctypes.c_char_p),
        ("path", ctypes.c_char_p),
        ("driver_min", ctypes.c_int32),
        ("kernel_count", ctypes.c_int32),
        ("bytes", ctypes.c_int64),
    ]


class SelectionStruct(Sized):
    _fields_ = [("struct_size", ctypes.c_uint64), ("row", ctypes.c_int32), ("variant", ctypes.c_int32)]


class KvInfo(Sized):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("row", ctypes.c_int32),
        ("reads_v", ctypes.c_int32),
    ]


# sagert_attention_args: struct_size, 7 sizes, 4 tensors of (data, 4 strides), lse, workspace, workspace_size, stream,
# scale, dtype, precision, flags, device. FEATURES follow, which plain calls leave 0: mask, mask_dtype, row,
# window_left, window_right, cu_seqlens_q, cu_seqlens_k, total_q, total_k, kv, kv_size.
ARGS = struct.Struct("=Q7q" + "Q4q" * 4 + "4Qd2iIi")
FEATURES = struct.Struct("=Q4q2i2q2Q2q2Q")
ARGS_SIZE = ARGS.size + FEATURES.size
# Numbers of the 8-byte words that change from call to call.
Q, K, V, OUT, LSE, WORKSPACE, WORKSPACE_SIZE, STREAM = 8, 13, 18, 23, 28, 29, 30, 31
MASK, CU_SEQLENS_Q, CU_SEQLENS_K, KV = 35, 43, 44, 47


class Arguments:
    """One sagert_attention_args: written once, after which only its pointers change. For one thread at a time."""

    __slots__ = ("_memory", "address", "words")

    def __init__(self, values: tuple[Any, ...], features: tuple[Any, ...] | None = None) -> None:
        self._memory = bytearray(ARGS_SIZE)
        ARGS.pack_into(self._memory, 0, ARGS_SIZE, *values)
        if features is not None:
            FEATURES.pack_into(self._memory, ARGS.size, *features)
        self.words = memoryview(self._memory).cast("Q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


_status = ctypes.c_int32
_P = ctypes.POINTER
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "sagert_version": (ctypes.c_char_p, []),
    "sagert_abi_version": (ctypes.c_uint32, []),
    "sagert_last_error": (ctypes.c_char_p, []),
    "sagert_open": (_status, []),
    "sagert_close": (_status, []),
    "sagert_driver_version": (_status, [_P(ctypes.c_int32)]),
    "sagert_device_count": (_status, [_P(ctypes.c_int32)]),
    "sagert_device_get": (_status, [ctypes.c_int32, _P(DeviceStruct)]),
    "sagert_row_count": (ctypes.c_int32, []),
    "sagert_row_get": (_status, [ctypes.c_int32, _P(RowStruct)]),
    "sagert_bundle_count": (ctypes.c_int32, []),
    "sagert_bundle_get": (_status, [ctypes.c_int32, _P(BundleStruct)]),
    "sagert_bundle_verify": (_status, [ctypes.c_int32]),
    "sagert_select": (_status, [_P(Request), _P(DeviceStruct), _P(SelectionStruct)]),
    "sagert_explain": (
        _status,
        [_P(Request), _P(DeviceStruct), ctypes.c_void_p, ctypes.c_uint64, _P(ctypes.c_uint64)],
    ),
    "sagert_workspace_size": (_status, [ctypes.c_void_p, ctypes.c_void_p]),
    "sagert_attention": (_status, [ctypes.c_void_p]),
    "sagert_quantize": (_status, [ctypes.c_void_p]),
    "sagert_attend": (_status, [ctypes.c_void_p]),
    "sagert_kv_plan": (_status, [ctypes.c_void_p, _P(KvInfo)]),
    "sagert_quantize_kv": (_status, [ctypes.c_void_p]),
}


def library_path() -> Path:
    """Where the library must be: lib/ of this package."""
    return PACKAGE / "lib" / LIBRARY_NAME


def _load() -> ctypes.CDLL:
    path = library_path()
    if not path.is_file():
        raise errors.IntegrityError(
            f"{path} is missing, so this installation has no kernels: reinstall the sagert wheel for this platform"
        )
    real = path.resolve()
    if not real.is_relative_to(PACKAGE):
        raise errors.IntegrityError(f"{path} points outside the package, to {real}: reinstall sagert")
    try:
        lib = ctypes.CDLL(str(real))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise errors.IntegrityError(f"{path} cannot be loaded: {error}. Reinstall sagert") from error
    found = lib.sagert_abi_version()
    if found != ABI_VERSION:
        raise errors.IntegrityError(
            f"{path} has ABI version {found}, this package needs {ABI_VERSION}: "
            "files of two versions are mixed, reinstall sagert"
        )
    return lib


_lib: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """The library, loaded at the first call. IntegrityError when it is missing or of another version."""
    global _lib
    if _lib is None:
        _lib = _load()
    return _lib


def error(status: int) -> BaseException:
    """The exception for a status, with this thread's message."""
    message = (library().sagert_last_error() or b"").decode("utf-8", "replace") or f"sagert status {status}"
    if status == OUT_OF_MEMORY:
        return errors.out_of_memory_error(message)
    return _ERRORS.get(status, errors.InternalError)(message)


def check(status: int) -> None:
    """Raises the exception of a status that is not OK."""
    if status != OK:
        raise error(status)
