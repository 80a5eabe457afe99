# SPDX-License-Identifier: Apache-2.0
"""Launches kernels of PTX text through the emulating driver, in a worker."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import numpy as np

from tests.emulator import worker

RELAXED = 2


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Status and message of a launch, and its arrays afterwards."""

    status: int
    error: str
    arrays: list[np.ndarray]


def _module(text: bytes) -> ctypes.c_void_p:
    cuda, handle, mode = worker.driver(), ctypes.c_void_p(), ctypes.c_int(RELAXED)
    assert cuda.cuInit(0) == 0
    context = ctypes.c_void_p()
    assert cuda.cuCtxGetCurrent(ctypes.byref(context)) == 0
    if not context.value:
        assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert cuda.cuCtxPushCurrent_v2(context) == 0
    cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    status = cuda.cuLibraryLoadData(ctypes.byref(handle), text, None, None, 0, None, None, 0)
    cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert status == 0, cuda.emulator_error()
    return handle


def launch(
    text: str,
    name: str,
    arguments: list[np.ndarray | int],
    *,
    folder: str,
    grid: int = 1,
    block: int = 32,
    shared: int = 0,
    cluster: int = 1,
    seed: int = 0,
) -> Result:
    """Runs a kernel of a module translated into `folder`; its parameters are pointers (arrays) and 32-bit integers."""
    os.environ["EMULATOR_TRANSLATIONS"], os.environ["EMULATOR_SEED"] = folder, str(seed)
    cuda, kernel = worker.driver(), ctypes.c_void_p()
    assert cuda.cuLibraryGetKernel(ctypes.byref(kernel), _module(text.encode()), name.encode()) == 0
    arrays = [x for x in arguments if isinstance(x, np.ndarray)]
    cells = [ctypes.c_uint64(x.ctypes.data) if isinstance(x, np.ndarray) else ctypes.c_int32(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
    attribute = _Attribute(4, 0, (ctypes.c_uint * 16)(cluster, 1, 1))
    config = _Config((grid, 1, 1), (block, 1, 1), shared, None, ctypes.addressof(attribute), int(cluster > 1))
    status = cuda.cuLaunchKernelEx(ctypes.byref(config), kernel, pointers, None)
    return Result(status, cuda.emulator_error().decode() if status else "", arrays)
