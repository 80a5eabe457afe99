# SPDX-License-Identifier: Apache-2.0
"""Plans: a call like an earlier one only launches, and what makes it another call is seen."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert import errors, ops, plans, quantized  # noqa: E402


def make(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 17, 32), make(2, 2, 29, 32, seed=1), make(2, 2, 29, 32, seed=2)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setattr(ops, "is_direct", lambda *tensors: True)


def call(*tensors, **options):
    return sagert.attention(*(tensors or (Q, K, V)), enable_gqa=True, **options)


def test_the_second_call_only_launches(recorder):
    lib = recorder()
    first, first_lse = call(return_lse=True)
    q, k, v = Q.clone(), K.clone(), V.clone()
    second, second_lse = call(q, k, v, return_lse=True)
    assert lib.names() == ["size", "run", "run"]
    (_, _, _), (_, before, _), (_, after, features) = lib.seen
    moved = {8: q, 13: k, 18: v, 23: second, 28: second_lse}
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new == moved[number].data_ptr() if number in moved else number == 29 or new == old
    assert set(features) == {0}
    assert second.shape == first.shape
    assert second.stride() == first.stride()
    assert second.data_ptr() != first.data_ptr()
    assert second_lse.shape == first_lse.shape


def test_layouts_have_their_own_plans(recorder):
    lib = recorder()
    q, k, v = (t.transpose(1, 2).contiguous() for t in (Q, K, V))
    outs = [call(q, k, v, layout="BSHD") for _ in range(2)]
    assert lib.names() == ["size", "run", "run"]
    assert [out.shape for out in outs] == [q.shape] * 2
    assert [out.stride() for out in outs] == [q.stride()] * 2
    assert lib.seen[1][1][24:28] == lib.seen[2][1][24:28]


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": True}, {"scale": 0.5}, {"precision": "int8_fp8"}, {"smooth_k": False}, {"return_lse": True},
        {"window": (2, 2)}, {"causal_alignment": "bottom_right"}, {"fallback": "sdpa"},
    ],
)  # fmt: skip
def test_other_options_are_other_plans(recorder, change):
    lib = recorder()
    call()
    call(**change)
    assert lib.names() == ["size", "run"] * 2
    call()
    assert lib.names() == ["size", "run"] * 2 + ["run"]


def test_other_strides_shapes_and_dtypes_are_other_plans(recorder):
    lib = recorder()
    call()
    call(torch.cat([Q, Q], -1)[..., :32], K, V)
    call(Q[:, :, :9], K, V)
    call(*(t.half() for t in (Q, K, V)))
    assert lib.names() == ["size", "run"] * 4


def test_strides_of_single_elements_mean_nothing(recorder):
    lib = recorder()
    q, k, v = (t[:1, :, :1] for t in (Q, K, V))
    strange = q.as_strided(q.shape, (7, 32, 5, 1))
    q = q.as_strided(q.shape, (128, 32, 32, 1))
    assert q.is_contiguous()
    assert strange.is_contiguous()
    assert call(q, k, v).stride() == call(strange, k, v).stride()
    assert lib.names() == ["size", "run", "run"]


def test_misaligned_tensors_ask_for_the_size_again(recorder):
    lib = recorder()
    call()
    lib.size = 8192
    shifted = torch.cat([V.new_zeros(1), V.flatten()])[1:].view(V.shape)
    call(Q, K, shifted)
    assert lib.names() == ["size", "run", "size", "run"]
    assert lib.seen[-1][1][30] == 8192
    call()
    assert lib.seen[-1][1][30] == 4096


def test_what_a_plan_does_not_know_of_takes_the_long_way(recorder, monkeypatch):
    lib = recorder()
    call()
    with pytest.raises(errors.UnsupportedError, match="backward"):
        call(Q.clone().requires_grad_(), K, V)
    with pytest.raises(errors.UnsupportedError, match="transforms"):
        torch.func.vmap(lambda q: call(q, K, V))(torch.stack([Q, Q]))
    with pytest.raises(errors.InvalidArgumentError, match="shares memory"):
        call(out=Q)
    monkeypatch.setattr(ops, "_is_autocast_enabled", lambda: True)
    assert lib.names() == ["size", "run"]
    call()
    assert lib.names() == ["size", "run"] * 2


def test_a_call_under_autocast_is_not_kept(recorder):
    """Its key would be that of the tensors before they were cast."""
    lib = recorder()
    q, k, v = (t.float() for t in (Q, K, V))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(q, k, v).dtype == torch.bfloat16
        sagert.quantize_kv(k, v)
    assert not plans.PLANS.by_key
    assert call(q, k, v).dtype == torch.float32
    assert lib.names() == ["size", "run", "quantize", "size", "run"]


@pytest.mark.parametrize("current", [3, 1])
def test_memory_is_that_of_the_tensors_device(recorder, monkeypatch, current):
    """The fast allocations serve the current device alone; another device has the general ones."""
    lib = recorder()
    fast = []

    def empty_current(shape, stride, dtype):
        assert type(shape) is type(stride) is tuple  # all that torch's own function takes
        fast.append((shape, stride, dtype))
        return torch.empty_strided(shape, stride, dtype=dtype)

    monkeypatch.setattr(plans, "_empty_current", empty_current)
    monkeypatch.setattr(plans, "_allocate_current", lambda size, stream: fast.append((size, stream)) or 1 << 30)
    monkeypatch.setattr(plans, "_free", lambda address: None)
    monkeypatch.setattr(plans, "_current_device", lambda: current)
    first, first_lse = call(return_lse=True)
    assert not fast
    out, lse = call(return_lse=True)
    assert (out.shape, out.stride(), out.dtype) == (first.shape, first.stride(), first.dtype)
    assert (lse.shape, lse.stride(), lse.dtype) == (first_lse.shape, first_lse.stride(), first_lse.dtype)
    made = [(tuple(t.shape), t.stride(), t.dtype) for t in (out, lse)] + [(4096, 77)]
    assert lib.workspaces == ([] if current == 3 else [(4096, 77)])
    assert lib.seen[-1][1][29:32] == (1 << 30 if current == 3 else (1 << 20) + 256, 4096, 77)
    assert fast == (made if current == 3 else [])


def test_masks_and_windows(recorder):
    lib = recorder()
    call(attn_mask=torch.zeros(29), window=(3, 4))
    mask = torch.ones(29)
    call(attn_mask=mask, window=(3, 4))
    assert lib.names() == ["size", "run", "run"]
    assert lib.seen[-1][2] == (mask.data_ptr(), 0, 0, 0, 1, 3, 0, 3, 4, 0, 0, 0, 0, 0, 0)
    call(attn_mask=torch.ones(1, 29), window=(3, 4))
    call(attn_mask=torch.ones(29).bool(), window=(3, 4))
    call()
    assert lib.names() == ["size", "run", "run"] + ["size", "run"] * 3
    assert set(lib.seen[-1][2]) == {0}


def test_out(recorder):
    lib = recorder()
    first, second = torch.empty_like(Q), torch.empty_like(Q)
    assert call(out=first) is first
    assert call(out=second) is second
    assert lib.names() == ["size", "run", "run"]
    assert lib.seen[-1][1][23] == second.data_ptr()
    assert second._version == 1
    with pytest.raises(errors.InvalidArgumentError, match="shares memory"):
        call(second, K, V, out=second)


def test_fp32_is_never_planned(recorder):
    recorder()
    call(*(t.float() for t in (Q, K, V)))
    assert not plans.PLANS.by_key


def test_packed_sequences(recorder):
    lib = recorder()
    q, k, v = make(17, 4, 32), make(29, 2, 32), make(29, 2, 24)
    cu_q, cu_k = torch.tensor([0, 5, 17], dtype=torch.int32), torch.tensor([0, 20, 29], dtype=torch.int32)
    for _ in range(2):
        sagert.attention_varlen(q, k, v, cu_q, cu_k, 12, 20, enable_gqa=True)
    again = cu_q.clone()
    out = sagert.attention_varlen(q, k, v, again, cu_k, 12, 20, enable_gqa=True)
    assert lib.names() == ["size", "run", "run", "run"]
    assert lib.seen[-1][2][9:11] == (again.data_ptr(), cu_k.data_ptr())
    assert out.shape == (17, 4, 24)
    sagert.attention_varlen(q, k, v, cu_q, cu_k, 13, 20, enable_gqa=True)
    assert lib.names()[-2:] == ["size", "run"]


def test_errors_of_the_launch_surface(recorder):
    lib = recorder()
    call()
    lib.status = 5
    with pytest.raises(errors.CudaError):
        call()
    assert len(lib.workspaces) == 1
    assert not lib.held


def test_workspaces_are_freed(recorder):
    lib = recorder()
    for _ in range(3):
        call()
    assert lib.workspaces == [(4096, 77)] * 2  # the first call's is a tensor
    assert not lib.held


def test_plans_are_bounded(recorder, monkeypatch):
    recorder()
    monkeypatch.setattr(plans, "_PLANS_MAX", 3)
    for length in range(1, 9):
        call(Q[:, :, :length], K, V)
    assert len(plans.PLANS.by_key) <= 3


def test_threads_share_no_plan(recorder):
    import threading

    lib = recorder()
    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert lib.names() == ["size", "run"] * 2


@pytest.mark.parametrize("kept", [None, V])
def test_quantized_keys(recorder, kept):
    lib = recorder()

    def make_kv(row=6):
        data = torch.empty(999, dtype=torch.uint8)
        v = kept if kept is None else kept.clone()
        return sagert.QuantizedKV(data, v, (2, 2, 29, 32), 32, torch.bfloat16, "int8_fp16", row, True, False)

    first, second = make_kv(), make_kv()
    mask = torch.zeros(29)
    sagert.attention(Q, first, attn_mask=mask, enable_gqa=True)
    out = sagert.attention(Q, second, attn_mask=mask, enable_gqa=True)
    assert lib.names() == ["size", "run", "run"]
    _, plain, features = lib.seen[-1]
    assert plain[13] == 0
    assert plain[18] == (0 if kept is None else second.v.data_ptr())
    assert features[0] == mask.data_ptr()
    assert features[-2:] == (second.data.data_ptr(), 999)
    assert out.shape == Q.shape
    sagert.attention(Q, make_kv(row=7), attn_mask=mask, enable_gqa=True)
    assert lib.names()[-2:] == ["size", "run"]
    assert lib.seen[-1][2][6] == 8
    with pytest.raises(errors.InvalidArgumentError, match="leave v out"):
        sagert.attention(Q, first, V, enable_gqa=True)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_quantizing_again(recorder, monkeypatch, layout):
    lib = recorder()
    planned = []

    def plan(*arguments):
        planned.append(arguments)
        return 4096, 6, False

    monkeypatch.setattr(quantized, "_plan", plan)

    def quantize(k=K, v=V, **options):
        return sagert.quantize_kv(k, v, layout=layout, **options)

    first, k, v = quantize(), K.clone(), V.clone()
    second = quantize(k, v)
    assert len(planned) == 1
    (_, before, features), (_, after, later) = lib.seen
    moved = {8 + 5: k, 8 + 10: v}
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new == (moved[number].data_ptr() if number in moved else old)
    assert later == (*features[:-2], second.data.data_ptr(), 4096)
    assert second.data.data_ptr() != first.data.data_ptr()
    names = ("v", "shape", "head_dim_v", "dtype", "precision", "row", "smooth_k", "masked", "nbytes")
    assert [getattr(second, name) for name in names] == [getattr(first, name) for name in names]
    assert (second.data.shape, second.data.dtype) == (first.data.shape, first.data.dtype)
    shifted = torch.cat([V.new_zeros(1), V.flatten()])[1:].view(V.shape)
    for number, change in enumerate(
        [{"masked": True}, {"smooth_k": False}, {"precision": "int8_int8"}, {"v": shifted}, {"k": K[..., :16]}]
    ):
        quantize(**change)
        assert len(planned) == 2 + number
    lib.status = 5
    with pytest.raises(errors.CudaError):
        quantize()


@pytest.mark.parametrize(("dtype", "reads_v"), [(torch.float32, False), (torch.bfloat16, True)])
def test_what_quantizing_copies_is_never_planned(recorder, monkeypatch, dtype, reads_v):
    recorder()
    monkeypatch.setattr(quantized, "_plan", lambda *arguments: (4096, 6, reads_v))
    sagert.quantize_kv(K.to(dtype), V.to(dtype))
    assert not plans.PLANS.by_key
