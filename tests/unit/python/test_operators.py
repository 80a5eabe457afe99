# SPDX-License-Identifier: Apache-2.0
"""The torch operators: schemas, fakes, torch.compile, export, autocast, and what transforms are told."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

import sagert  # noqa: E402
from sagert import errors  # noqa: E402


def make(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 17, 32), make(2, 2, 29, 32, seed=1), make(2, 2, 29, 32, seed=2)


MASKS = {
    "none": None,
    "bool": torch.rand(17, 29, generator=torch.Generator().manual_seed(3)) > 0.4,
    "float": make(2, 1, 1, 29, dtype=torch.float32, seed=4),
}
CU_Q, CU_K = torch.tensor([0, 5, 5, 17], dtype=torch.int32), torch.tensor([0, 9, 20, 29], dtype=torch.int32)
PACKED = (make(17, 4, 32), make(29, 2, 32, seed=1), make(29, 2, 16, seed=2))
HEADS_INSIDE = Q.transpose(1, 2).contiguous().transpose(1, 2)
REQUEST = (0.2, True, 1, True)
KV = sagert.quantize_kv(K, V)
KV_SIZES = (2, 29, 32, -1)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_opcheck(return_lse, mask):
    request = (*REQUEST, return_lse, False, 3, -1, True)
    for q in (Q, HEADS_INSIDE):
        torch.library.opcheck(torch.ops.sagert.attention, (q, K, V, MASKS[mask], *request))
        torch.library.opcheck(torch.ops.sagert.attention_out, (torch.empty_like(q), q, K, V, MASKS[mask], *request))
        inputs = (q, KV.data, KV.v, MASKS[mask], *KV_SIZES, *request)
        torch.library.opcheck(torch.ops.sagert.attention_kv, inputs)
        torch.library.opcheck(torch.ops.sagert.attention_kv_out, (torch.empty_like(q), *inputs))


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck_of_packed_sequences(return_lse):
    for q in (PACKED[0], PACKED[0].transpose(0, 1).contiguous().transpose(0, 1)):
        inputs = (q, *PACKED[1:], CU_Q, CU_K, 12, 11, *REQUEST, return_lse)
        torch.library.opcheck(torch.ops.sagert.attention_varlen, inputs)
        torch.library.opcheck(torch.ops.sagert.attention_varlen_out, (q.new_empty(17, 4, 16), *inputs))


@pytest.mark.parametrize("precision", [1, 2])
def test_opcheck_of_quantize_kv(precision):
    name = {1: "int8_fp16", 2: "int8_fp8"}[precision]
    size = sagert.quantize_kv(K, V, precision=name).data.numel()
    torch.library.opcheck(torch.ops.sagert.quantize_kv, (K, V, precision, True, -1, size))


@pytest.mark.parametrize("layout", ["contiguous", "heads_inside", "packed", "one_head", "one_query"])
def test_fake_has_the_real_strides(layout):
    q = {
        "contiguous": Q,
        "heads_inside": HEADS_INSIDE,
        "packed": torch.cat([Q, Q], -1)[..., :32],
        "one_head": Q[:, :1],
        "one_query": Q[:, :, :1],
    }[layout]
    k, v = (K[:, :1], V[:, :1])
    request = (None, 1.0, False, 1, True, True)
    operator = torch.ops.sagert.attention
    out, lse = operator(q, k, v, *request)
    fake, fake_lse = operator(q.to("meta"), k.to("meta"), v.to("meta"), *request)
    assert fake.shape == out.shape
    assert lse.shape == fake_lse.shape
    meta_q = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device="meta")
    assert operator(meta_q, k.to("meta"), v.to("meta"), *request)[0].stride() == out.stride()


def test_meta_tensors_through_the_public_functions():
    q, k = Q.to("meta"), K.to("meta")
    mask = torch.empty(29, dtype=torch.bool, device="meta")
    assert sagert.attention(q, k, k, attn_mask=mask, enable_gqa=True, window=(3, 4)).shape == Q.shape
    cu = CU_Q.to("meta")
    q, k, v = (t.to("meta") for t in PACKED)
    assert sagert.attention_varlen(q, k, v, cu, cu, 9, 9, enable_gqa=True).shape == (17, 4, 16)


def test_fake_cuda_tensors_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 4, 17, 32, device="cuda:0", dtype=torch.bfloat16)
        k = torch.empty(2, 2, 29, 32, device="cuda:0", dtype=torch.bfloat16)
        mask = torch.empty(4, 17, 29, device="cuda:0")
        out, lse = sagert.attention(q, k, k, attn_mask=mask, enable_gqa=True, return_lse=True)
        assert out.shape == q.shape
        assert out.device == q.device
        assert lse.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    torch._dynamo.reset()

    def model(q, k, v):
        out, lse = sagert.attention(q * 2, k, v, is_causal=True, enable_gqa=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (17, 23, 40):
        q, k, v = make(2, 4, length, 32), make(2, 2, length, 32, seed=1), make(2, 2, length, 32, seed=2)
        for got, expected in zip(compiled(q, k, v), model(q, k, v), strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8"])
def test_compile_every_feature(dynamic, precision):
    torch._dynamo.reset()

    def model(q, k, v, mask, packed, cu):
        options = {"enable_gqa": True, "precision": precision, "return_lse": True}
        first, lse = sagert.attention(
            q, k, v, attn_mask=mask, is_causal=True, causal_alignment="bottom_right", window=(9, None), **options
        )
        kv = sagert.quantize_kv(k, v, precision=precision, masked=True)
        second, _ = sagert.attention(q * 1, kv, attn_mask=mask, **options)
        third, packed_lse = sagert.attention_varlen(packed, packed, packed, cu, cu, 9, 9, window=(2, 2), **options)
        return first + second, lse, third, packed_lse

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (17, 23, 40):
        q, k, v = make(2, 4, length, 32), make(2, 2, length + 3, 32, seed=1), make(2, 2, length + 3, 16, seed=2)
        mask = make(2, 1, length, length + 3, dtype=torch.float32, seed=3)
        packed = make(length, 2, 16, seed=4)
        cu = torch.tensor([0, 8, 8, length], dtype=torch.int32)
        arguments = (q, k, v, mask, packed, cu)
        for got, expected in zip(compiled(*arguments), model(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


def test_compile_with_a_quantized_kv_from_outside():
    torch._dynamo.reset()
    kv = sagert.quantize_kv(K, V, precision="int8_fp8")
    compiled = torch.compile(lambda q, kv: sagert.attention(q, kv, enable_gqa=True), fullgraph=True, backend="eager")
    assert torch.equal(compiled(Q, kv), sagert.attention(Q, K, V, precision="int8_fp8", enable_gqa=True))


def test_compile_gives_a_quantized_kv_back():
    torch._dynamo.reset()
    compiled = torch.compile(lambda k, v: sagert.quantize_kv(k, v), fullgraph=True, backend="eager")
    kv = compiled(K, V)
    assert torch.equal(kv.data, KV.data)
    assert torch.equal(sagert.attention(Q, kv, enable_gqa=True), sagert.attention(Q, K, V, enable_gqa=True))


def test_compile_with_out_and_layout():
    torch._dynamo.reset()

    def model(q, k, v, out):
        sagert.attention(q, k, v, out=out, layout="BSHD", precision="int8_fp8")
        return out * 2

    q = make(2, 17, 4, 32)
    out = torch.zeros_like(q)
    result = torch.compile(model, fullgraph=True, backend="aot_eager")(q, q, q, out)
    expected = sagert.attention(q, q, q, layout="BSHD", precision="int8_fp8")
    assert torch.equal(out, expected)
    assert torch.equal(result, expected * 2)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return sagert.attention(q, k, v, enable_gqa=True)

    program = torch.export.export(Model(), (Q, K, V))
    assert torch.equal(program.module()(Q, K, V), sagert.attention(Q, K, V, enable_gqa=True))
    assert any("sagert.attention" in str(node.target) for node in program.graph.nodes)


def test_export_with_a_mask_and_packed_sequences():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, mask, packed, cu):
            masked = sagert.attention(q, k, v, attn_mask=mask, enable_gqa=True, window=(4, 4))
            return masked, sagert.attention_varlen(packed, packed, packed, cu, cu, 9, 9)

    packed = make(17, 2, 16)
    inputs = (Q, K, V, MASKS["bool"], packed, CU_Q)
    program = torch.export.export(Model(), inputs)
    for got, expected in zip(program.module()(*inputs), Model()(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_inference_mode():
    with torch.inference_mode():
        q = Q * 1
        out = torch.empty_like(q)
        sagert.attention(q, K, V, enable_gqa=True, out=out)
    assert torch.equal(out, sagert.attention(Q, K, V, enable_gqa=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_casts_as_sdpa_does(dtype):
    q, k, v = Q.to(dtype), K.to(dtype), V.to(dtype)
    mask = MASKS["float"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sagert.attention(q, k, v, attn_mask=mask, enable_gqa=True)
        kv = sagert.quantize_kv(k, v)
        packed = sagert.attention_varlen(
            q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), CU_Q, CU_K, 17, 29, enable_gqa=True
        )
        reused = sagert.attention(q, kv, attn_mask=mask, enable_gqa=True)
        assert F.scaled_dot_product_attention(q, k, v, enable_gqa=True).dtype == torch.bfloat16
    assert out.dtype == packed.dtype == kv.dtype == torch.bfloat16
    q, k, v, mask = (t.bfloat16() for t in (q, k, v, mask))
    assert torch.equal(out, sagert.attention(q, k, v, attn_mask=mask, enable_gqa=True))
    assert torch.equal(reused, out)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_are_refused(transform):
    def run(q):
        return sagert.attention(q, K, K, enable_gqa=True).float().sum()

    calls = {
        "vmap": lambda: torch.func.vmap(run)(torch.stack([Q, Q])),
        "grad": lambda: torch.func.grad(run)(Q),
        "jvp": lambda: torch.func.jvp(run, (Q,), (Q,)),
    }
    with pytest.raises(errors.UnsupportedError, match=r"transforms|backward"):
        calls[transform]()


def test_transforms_of_the_operator_are_refused():
    request = (None, 1.0, False, 1, True, False)
    with pytest.raises(errors.UnsupportedError, match="vmap"):
        torch.func.vmap(lambda q: torch.ops.sagert.attention(q, K, V, *request))(torch.stack([Q, Q]))
    with pytest.raises(errors.UnsupportedError, match="backward"):
        torch.func.grad(lambda q: torch.ops.sagert.attention(q, K, V, *request)[0].float().sum())(Q)


def test_forward_mode_tangents_are_refused():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, torch.ones_like(Q))
        with pytest.raises(errors.UnsupportedError, match="differentiable"):
            sagert.attention(dual, K, V, enable_gqa=True)
        assert sagert.attention(Q, K, V, enable_gqa=True).shape == Q.shape


def test_compiled_gradients_are_refused():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: sagert.attention(q, K, V, enable_gqa=True), backend="aot_eager")
    with pytest.raises(Exception, match="backward"):
        compiled(Q.clone().requires_grad_())
