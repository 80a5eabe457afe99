# SPDX-License-Identifier: Apache-2.0
"""quantize_kv() on CPU tensors: the same bits as one call, memory, and malformed calls."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert import quantize, reference_kv  # noqa: E402
from sagert.errors import InvalidArgumentError, UnsupportedError  # noqa: E402


def make(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 17, 40), make(2, 2, 150, 40, seed=1), make(2, 2, 150, 24, seed=2)
MASK = torch.rand(2, 1, 17, 150, generator=torch.Generator().manual_seed(3)) > 0.5


@pytest.mark.parametrize("precision", ["auto", "int8_fp16", "int8_fp8", "int8_int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_same_bits_as_one_call(precision, dtype, smooth_k, layout):
    q, k, v = (t.to(dtype, copy=True) for t in (Q, K, V))
    k[0, 0, 3, 4], v[0, 1, 20, 5], v[0, 1, 30, 5], v[1, 0, 2, 1] = math.inf, math.inf, -math.inf, math.nan
    options = {"enable_gqa": True, "return_lse": True, "layout": layout}
    if layout == "BSHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    kv = sagert.quantize_kv(k, v, precision=precision, smooth_k=smooth_k, layout=layout)
    for more in ({}, {"attn_mask": MASK}, {"is_causal": True, "causal_alignment": "bottom_right"}, {"window": (9, 2)}):
        expected = sagert.attention(q, k, v, precision=precision, smooth_k=smooth_k, **options, **more)
        copies = [t.clone() for t in (k, v)]
        k.zero_(), v.zero_()
        result = sagert.attention(q, kv, precision=precision, **options, **more)
        k.copy_(copies[0]), v.copy_(copies[1])
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_out():
    kv = sagert.quantize_kv(K, V)
    out = torch.full((2, 4, 17, 24), math.nan, dtype=torch.float16)
    assert sagert.attention(Q, kv, out=out, enable_gqa=True) is out
    assert torch.equal(out, sagert.attention(Q, K, V, enable_gqa=True))
    with pytest.raises(InvalidArgumentError, match="shares memory with the QuantizedKV"):
        sagert.attention(Q, kv, out=kv.data[: out.numel() * 2].view(torch.float16).view(out.shape), enable_gqa=True)


@pytest.mark.parametrize(
    ("precision", "per_key", "per_head"),
    [
        ("int8_fp16", 40 + 4 + 48, 160),
        ("int8_fp8", 40 + 4 + 24, 160 + 96),
        ("int8_int8", 40 + 4 + 24, 160 + 3 * 96),
    ],
)
def test_memory_is_as_documented(precision, per_key, per_head):
    kv = sagert.quantize_kv(K, V, precision=precision)
    assert kv.nbytes == 4 * (150 * per_key + per_head)
    assert (kv.v is None) == (precision != "int8_fp16")
    assert kv.precision == precision
    assert precision in repr(kv)


def test_no_keys():
    kv = sagert.quantize_kv(K[:, :, :0], V[:, :, :0])
    out, lse = sagert.attention(Q, kv, enable_gqa=True, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_v_codes_hold_every_nonfinite_value():
    v = torch.tensor([[[1.0, -0.0], [math.inf, -2.0], [-math.inf, math.nan], [-448.0, 448.0]]])
    values, _ = quantize.quantize_v_fp8(v)
    decoded, positive, negative = quantize.decode_v_fp8(quantize.encode_v_fp8(values, v))
    assert torch.equal(decoded, values)
    nan = v.isnan()
    assert torch.equal(positive, nan | (v == math.inf))
    assert torch.equal(negative, nan | (v == -math.inf))


KV = sagert.quantize_kv(K, V, precision="int8_fp8")


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((Q, KV, V), {}, ("v was given with a QuantizedKV", "leave v out")),
        ((Q.bfloat16(), KV), {}, ("q has dtype torch.bfloat16", "torch.float16")),
        ((Q.to("meta"), KV), {}, ("q is on meta",)),
        ((Q[:1], KV), {}, ("batch size 1",)),
        ((Q[..., :16], KV), {}, ("head dims of q and k are 16 and 40",)),
        ((Q, KV), {"enable_gqa": False}, ("enable_gqa=True",)),
        ((Q[0], KV), {}, ("q has 3 dimensions",)),
        ((Q, KV), {"precision": "int8_fp16"}, ("precision='int8_fp16'", "int8_fp8")),
        ((Q, KV), {"attn_mask": torch.ones(17, 149)}, ("(17, 149)", "[2, 4, 17, 150]")),
        ((Q, K, KV), {}, ("v is a QuantizedKV",)),
        ((KV, KV), {}, ("q is a QuantizedKV",)),
    ],
)
def test_malformed_call(arguments, options, words):
    with pytest.raises(InvalidArgumentError) as raised:
        sagert.attention(*arguments, **{"enable_gqa": True, **options})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        ((K, V[:, :, :9]), {}, "sequence lengths"),
        ((K, V[:1]), {}, "batch sizes"),
        ((K, V.bfloat16()), {}, "one dtype"),
        ((K[0], V), {}, "k has 3 dimensions"),
        ((K, None), {}, "v is a NoneType"),
        ((K, V), {"layout": "X"}, "layout='X'"),
        ((K, V), {"precision": "int3"}, "precision='int3'"),
    ],
)
def test_malformed_quantize_kv(arguments, options, word):
    with pytest.raises(InvalidArgumentError, match=word):
        sagert.quantize_kv(*arguments, **options)


def test_what_nothing_serves():
    with pytest.raises(UnsupportedError, match="nvfp4"):
        sagert.quantize_kv(K, V, precision="nvfp4")
    with pytest.raises(UnsupportedError, match="backward"):
        sagert.quantize_kv(K.clone().requires_grad_(), V)
    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.5"):
        sagert.attention(Q, KV, dropout_p=0.5, fallback="sdpa", enable_gqa=True)
    with pytest.raises(UnsupportedError, match="float64"):
        sagert.quantize_kv(K.double(), V.double())


def test_reference_without_v_says_so():
    data = reference_kv.quantize_kv(K, V, precision="int8_fp16")
    with pytest.raises(ValueError, match="reads v"):
        reference_kv.attend(Q, data, None, 2, 150, 24, precision="int8_fp16", seen=reference_kv.Pattern(), scale=1.0)
