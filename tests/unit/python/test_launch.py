# SPDX-License-Identifier: Apache-2.0
"""What the CUDA path hands to the library: the struct of every entry point, plans, statuses. A recorder stands in."""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert import errors, launch, native, ops, quantized, reference  # noqa: E402
from sagert.options import Options  # noqa: E402
from tests.kit.recorder import NONE  # noqa: E402


def make(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 17, 32), make(2, 2, 29, 32, seed=1), make(2, 2, 29, 32, seed=2)


OPTIONS = Options(0.25, True, 2, False, True)


def run(q=Q, k=K, v=V, mask=None, **options):
    out, lse = torch.empty_like(Q, dtype=q.dtype), torch.empty(2, 4, 17)
    launch.attention(out, lse, q, k, v, mask, *OPTIONS._replace(**options))
    return out, lse


def test_a_plain_call_packs_its_arguments_and_no_features(recorder):
    lib = recorder()
    out, lse = run()
    (first, before, features), (second, after, later) = lib.seen
    assert (first, second) == ("size", "run")
    assert before[0] == native.ARGS_SIZE == 280 + 112
    assert before[1:8] == (2, 4, 2, 17, 29, 32, 32)
    assert before[8:13] == (Q.data_ptr(), *Q.stride())
    assert before[13:18] == (K.data_ptr(), *K.stride())
    assert before[18:23] == (V.data_ptr(), *V.stride())
    assert before[23:28] == (out.data_ptr(), *out.stride())
    assert before[28] == lse.data_ptr()
    assert before[29:31] == (0, 0)
    assert before[31:] == (77, 0.25, 2, 2, 1 | 2 | 32, 3)
    assert after[29] != 0
    assert after[30] == 4096
    assert after[:29] == before[:29]
    assert after[31:] == before[31:]
    assert set(features) == set(later) == {0}


@pytest.mark.parametrize(("dtype", "code"), [("float16", 1), ("bfloat16", 2), ("float32", 3), ("bool", 4)])
def test_a_mask_is_passed_as_a_view(recorder, dtype, code):
    lib = recorder()
    mask = torch.zeros(4, 1, 29, dtype=getattr(torch, dtype))
    run(mask=mask, window_left=5, bottom_right=True)
    _, plain, features = lib.seen[-1]
    assert plain[-2] == 1 | 2 | 32 | 4 | 128 | 256
    assert features == (mask.data_ptr(), 0, 29, 0, 1, code, 0, 5, -1, 0, 0, 0, 0, 0, 0)


def test_alignment_alone_changes_nothing(recorder):
    lib = recorder()
    run(is_causal=False, bottom_right=True)
    assert lib.seen[-1][1][-2] == 2 | 32
    run(bottom_right=True)
    assert lib.seen[-1][1][-2] == 1 | 2 | 32 | 256


def test_fp32_goes_through_bf16(recorder):
    lib = recorder()
    wide = [t.float() for t in (Q, K, V)]  # kept: what is freed may give its address to the casts
    out, _ = run(*wide)
    _, plain, _ = lib.seen[-1]
    assert plain[33] == 2
    assert wide[0].data_ptr() not in (plain[8], plain[23])
    assert plain[23] != out.data_ptr()
    assert out.dtype == torch.float32
    with pytest.raises(errors.UnsupportedError, match=r"cast to torch\.float16"):
        run(*(t.double() for t in (Q, K, V)))


def test_packed_sequences(recorder):
    lib = recorder()
    q, k, v = make(17, 4, 32), make(2, 29, 32).transpose(0, 1), make(29, 2, 24)
    cu_q, cu_k = torch.tensor([0, 5, 17], dtype=torch.int32), torch.tensor([0, 20, 29], dtype=torch.int32)
    out, lse = torch.empty(17, 4, 24, dtype=torch.bfloat16), torch.empty(4, 17)
    launch.attention_varlen(out, lse, q, k, v, cu_q, cu_k, 12, 20, *OPTIONS._replace(window_right=0))
    name, plain, features = lib.seen[-1]
    assert name == "run"
    assert plain[1:8] == (2, 4, 2, 12, 20, 32, 24)
    assert plain[8:13] == (q.data_ptr(), 0, 32, 128, 1)
    assert plain[13:18] == (k.data_ptr(), 0, 29 * 32, 32, 1)
    assert plain[-2] == 1 | 2 | 32 | 64 | 128
    assert features == (*NONE, 0, 0, -1, 0, cu_q.data_ptr(), cu_k.data_ptr(), 17, 29, 0, 0)


def test_attention_over_quantized_keys(recorder):
    lib = recorder()
    data, mask = torch.empty(999, dtype=torch.uint8), torch.zeros(29)
    out = torch.empty_like(Q)
    launch.attention_kv(out, None, Q, data, V, mask, 2, 29, 32, 6, *OPTIONS._replace(return_lse=False))
    _, plain, features = lib.seen[-1]
    assert plain[1:8] == (2, 4, 2, 17, 29, 32, 32)
    assert plain[13:18] == NONE
    assert plain[18] == V.data_ptr()
    assert plain[-2] == 1 | 32 | 4 | 512
    assert features[:7] == (mask.data_ptr(), 0, 0, 0, 1, 3, 7)
    assert features[-2:] == (data.data_ptr(), 999)
    lib.size_status = 2
    with pytest.raises(errors.UnsupportedError, match=r"masked=True[\s\S]*every row said no"):
        launch.attention_kv(out, None, Q, data, None, mask, 2, 29, 32, 6, *OPTIONS._replace(return_lse=False))


def quantize(monkeypatch, k, v, **options):
    """quantize_kv() with CPU tensors sent to the CUDA path."""

    class Place:
        type, index = "cuda", 3

    class OnDevice(torch.Tensor):
        device = Place()

        def clone(self, **options):
            return self.as_subclass(torch.Tensor).clone(**options).as_subclass(OnDevice)

    monkeypatch.setattr(ops, "is_direct", lambda *tensors: True)
    monkeypatch.setattr(quantized, "autocast", lambda place, *tensors: tensors)
    monkeypatch.setattr(quantized, "_row_precision", lambda row: "int8_fp8")
    return sagert.quantize_kv(k.as_subclass(OnDevice), v.as_subclass(OnDevice), **options)


@pytest.mark.parametrize("masked", [False, True])
def test_quantize_kv_plans_then_quantizes(recorder, monkeypatch, masked):
    lib = recorder()
    kv = quantize(monkeypatch, K, V, masked=masked, smooth_k=False)
    assert lib.names() == ["plan", "quantize"]
    (_, planned, chosen), (_, plain, features) = lib.seen
    assert planned[1:8] == (2, 2, 2, 29, 29, 32, 32)
    assert planned[8:13] == planned[23:28] == NONE
    assert planned[-4:] == (2, 0, 32 | 512 | ((4 | 128 | 256) if masked else 0), 3)
    assert chosen == (*NONE, 4 if masked else 0, 0, -1, -1, 0, 0, 0, 0, 0, 0)
    assert plain[-4:] == (2, 2, 32 | 512, 3)  # by now the precision and the row have names
    assert features[6] == 7
    assert features[-2:] == (kv.data.data_ptr(), 4096)
    assert (kv.row, kv.precision, kv.v, kv.nbytes, kv.masked) == (6, "int8_fp8", None, 4096, masked)


def test_quantize_kv_keeps_a_copy_of_v_that_is_read(recorder, monkeypatch):
    lib = recorder(reads_v=True)
    v = torch.cat([V, V], -1)[..., :32]
    kv = quantize(monkeypatch, K, v, precision="int8_fp16")
    assert lib.names() == ["plan", "plan", "quantize"]
    assert lib.seen[0][1][18:23] == (v.data_ptr(), *v.stride())
    assert lib.seen[2][1][18:23] == (kv.v.data_ptr(), *kv.v.stride())
    assert kv.v.is_contiguous()
    assert kv.v.data_ptr() != v.data_ptr()
    assert lib.seen[1][2][6] == 7
    assert kv.nbytes == 4096 + V.numel() * 2


STATUSES = [
    (1, errors.InvalidArgumentError),
    (2, errors.UnsupportedError),
    (3, errors.NoDriverError),
    (4, errors.IntegrityError),
    (5, errors.CudaError),
    (6, torch.OutOfMemoryError),
    (7, errors.InternalError),
    (99, errors.InternalError),
]


@pytest.mark.parametrize(("status", "kind"), STATUSES)
def test_statuses_become_exceptions(recorder, status, kind):
    recorder(size_status=status)
    with pytest.raises(kind, match="every row said no"):
        run()
    if status != 2:  # a refusal comes before the launch
        recorder(status=status)
        with pytest.raises(kind):
            run(fallback_sdpa=True, return_lse=False)


@pytest.mark.parametrize("status", [1, 3, 4, 5, 6, 7])
def test_only_a_refusal_falls_back(recorder, status):
    recorder(size_status=status)
    with pytest.raises(Exception, match="every row said no"):
        run(fallback_sdpa=True, return_lse=False)


def test_a_refusal_falls_back_with_every_feature(recorder):
    recorder(size_status=2)
    mask = torch.rand(17, 29) > 0.3
    with pytest.warns(UserWarning, match="every row said no"):
        out, _ = run(mask=mask, fallback_sdpa=True, return_lse=False, is_causal=False, window_left=3)
    exact, _ = reference.exact_attention(Q, K, V, attn_mask=mask, window=(3, None), scale=0.25)
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)
    assert sagert.stats()["fallbacks"]["every row said no"] == 1


def test_grad_flag_reaches_the_library(recorder):
    lib = recorder()
    run(Q, K.clone().requires_grad_(), V)
    assert lib.seen[0][1][-2] & 16


def test_struct_matches_the_mirror():
    words = {
        native.Q: 8 + 7 * 8, native.LSE: 8 + 7 * 8 + 4 * 40, native.WORKSPACE: 232, native.WORKSPACE_SIZE: 240,
        native.STREAM: 248, native.MASK: 280, native.CU_SEQLENS_Q: 280 + 64, native.KV: 280 + 96,
    }  # fmt: skip
    assert all(8 * word == offset for word, offset in words.items())
    assert native.ARGS.size == 280
    assert ctypes.sizeof(native.Request) == 104
    assert ctypes.sizeof(native.DeviceStruct) == 8 + 6 * 4 + 8 + 128 + 16
    assert ctypes.sizeof(native.KvInfo) == 24
    assert native.Request().struct_size == 104
