# SPDX-License-Identifier: Apache-2.0
"""NativeCall: what it packs for the C ABI, read back from memory by a stand-in for the library."""

from __future__ import annotations

import ctypes
import types

import pytest

torch = pytest.importorskip("torch")
import native_call  # noqa: E402

from sagert import codes, native  # noqa: E402

TENSORS = ("q", "k", "v", "out")
SIZES = ("struct_size", "batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
ARGUMENT_NAMES = (
    *SIZES,
    *(name + part for name in TENSORS for part in ("", "_b", "_h", "_s", "_d")),
    *("lse", "workspace", "workspace_size", "stream", "scale", "dtype", "precision", "flags", "device"),
)
FEATURE_NAMES = (
    *("mask", "mask_b", "mask_h", "mask_s", "mask_d", "mask_dtype", "row", "window_left", "window_right"),
    *("cu_seqlens_q", "cu_seqlens_k", "total_q", "total_k", "kv", "kv_size"),
)
WORKSPACE = 1000


class Recorder:
    """A library that keeps the arguments of each call."""

    def __init__(self):
        self.calls = []

    def read(self, address):
        memory = ctypes.string_at(address, native.ARGS_SIZE)
        fields = dict(zip(ARGUMENT_NAMES, native.ARGS.unpack_from(memory, 0), strict=True))
        fields |= zip(FEATURE_NAMES, native.FEATURES.unpack_from(memory, native.ARGS.size), strict=True)
        return types.SimpleNamespace(**fields)

    def sagert_workspace_size(self, address, needed):
        ctypes.c_uint64.from_address(needed).value = WORKSPACE
        return native.OK

    def sagert_attention(self, address):
        self.calls.append(self.read(address))
        return native.OK

    def sagert_kv_plan(self, address, info):
        info._obj.bytes, info._obj.row = 512, 6
        return native.OK

    sagert_quantize_kv = sagert_attention


@pytest.fixture
def library(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(native, "library", lambda: recorder)
    monkeypatch.setattr(native_call, "row_number", {"one": 1, "four": 4}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    return recorder


def test_plain_call(library):
    q = torch.empty(2, 9, 6, 16, dtype=torch.float16).transpose(1, 2)
    k, v = torch.empty(2, 3, 5, 16, dtype=torch.float16), torch.empty(2, 3, 5, 8, dtype=torch.float16)
    out, lse = torch.empty(2, 6, 9, 8, dtype=torch.float16), torch.empty(2, 6, 9)
    call = native_call.NativeCall(q, k, v, out, precision="int8_fp8", lse=lse, causal=True, margin=64)
    call.run()
    (seen,) = library.calls
    assert seen.struct_size == native.ARGS_SIZE
    assert (seen.batch, seen.heads_q, seen.heads_kv, seen.seqlen_q, seen.seqlen_k) == (2, 6, 3, 9, 5)
    assert (seen.head_dim, seen.head_dim_v) == (16, 8)
    assert (seen.q, seen.q_b, seen.q_h, seen.q_s, seen.q_d) == (q.data_ptr(), *q.stride())
    assert (seen.out, seen.out_s, seen.lse) == (out.data_ptr(), 8, lse.data_ptr())
    assert (seen.stream, seen.device, seen.scale) == (77, 3, 0.25)
    assert seen.flags == codes.FLAG_CAUSAL | codes.FLAG_LSE
    assert (seen.mask, seen.row, seen.window_left, seen.window_right, seen.cu_seqlens_q, seen.kv) == (
        0,
        0,
        -1,
        -1,
        0,
        0,
    )
    assert (call.workspace_size, seen.workspace_size) == (WORKSPACE, WORKSPACE)
    assert bool(call.intact())
    ctypes.memset(seen.workspace, 0, WORKSPACE)
    assert bool(call.intact())
    ctypes.memset(seen.workspace + WORKSPACE, 0, 1)
    assert not bool(call.intact())


def test_features(library):
    q, k, v, out = (torch.empty(1, 4, 7, 8, dtype=torch.bfloat16) for _ in range(4))
    mask = torch.zeros(7, 1, dtype=torch.float32)
    native_call.NativeCall(
        q, k, v, out, precision="int8_fp16", row="four", mask=mask, window=(None, 3), bottom_right=True, smooth_k=False
    ).run()
    (seen,) = library.calls
    wanted = codes.FLAG_MASK | codes.FLAG_WINDOW | codes.FLAG_BOTTOM_RIGHT | codes.FLAG_NO_SMOOTH_K
    assert seen.flags == wanted
    assert (seen.mask, seen.mask_b, seen.mask_h, seen.mask_s, seen.mask_d) == (mask.data_ptr(), 0, 0, 1, 0)
    assert (seen.mask_dtype, seen.row) == (codes.MASK_DTYPES["float32"], 4)
    assert (seen.window_left, seen.window_right) == (-1, 3)


def test_packed_sequences(library):
    q, out = (torch.empty(30, 4, 8, dtype=torch.bfloat16) for _ in range(2))
    fused = torch.empty(50, 2, 2, 8, dtype=torch.bfloat16)
    k, v = fused.unbind(1)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ([0, 10, 30], [0, 45, 50])]
    native_call.NativeCall(q, k, v, out, precision="int8_fp16", packed=native_call.Packed(*bounds, 20, 45)).run()
    (seen,) = library.calls
    assert seen.flags == codes.FLAG_VARLEN
    assert (seen.batch, seen.heads_q, seen.heads_kv, seen.seqlen_q, seen.seqlen_k) == (2, 4, 2, 20, 45)
    assert (seen.total_q, seen.total_k) == (30, 50)
    assert (seen.cu_seqlens_q, seen.cu_seqlens_k) == tuple(t.data_ptr() for t in bounds)
    assert (seen.v, seen.v_h, seen.v_s, seen.v_d) == (v.data_ptr(), 8, 32, 1)
    assert (seen.q_h, seen.q_s) == (8, 32)


def test_two_calls(library, monkeypatch):
    monkeypatch.setattr(native, "KvInfo", types.SimpleNamespace, raising=False)
    monkeypatch.setattr(ctypes, "byref", lambda info: types.SimpleNamespace(_obj=info))
    q, k, v, out = (torch.empty(1, 4, 7, 8, dtype=torch.bfloat16) for _ in range(4))
    call = native_call.NativeCall(q, k, v, out, precision="int8_fp16", two_calls=True, margin=256)
    call.run()
    quantize, attend = library.calls
    assert quantize == attend
    assert attend.flags == codes.FLAG_QUANTIZED_KV
    assert (attend.row, attend.kv_size, attend.workspace_size) == (7, 512, WORKSPACE)
    assert bool(call.intact())
    ctypes.memset(attend.kv - 1, 0, 1)
    assert not bool(call.intact())


def test_row_number(monkeypatch):
    rows = [types.SimpleNamespace(id=name) for name in ("a", "b")]
    monkeypatch.setattr(native_call.sagert, "kernels", lambda: rows)
    assert native_call.row_number("b") == 2
