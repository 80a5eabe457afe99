# SPDX-License-Identifier: Apache-2.0
"""attention() on CPU tensors: layouts, strides, grouped heads, out=, LSE, degenerate sizes."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert import reference  # noqa: E402


def make(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 37, 48), make(2, 2, 53, 48, seed=1), make(2, 2, 53, 48, seed=2)


@pytest.mark.parametrize("precision", ["auto", "int8_fp16", "int8_fp8"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_against_exact(precision, causal, dtype):
    q, k, v = Q.to(dtype), K.to(dtype), V.to(dtype)
    out, lse = sagert.attention(q, k, v, is_causal=causal, precision=precision, enable_gqa=True, return_lse=True)
    exact, exact_lse = reference.exact_attention(q, k, v, is_causal=causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 4, 37)
    assert reference.error_metrics(out, exact)["relative_l1"] < 0.045
    assert (lse - exact_lse).abs().max() < 0.03


def test_bshd_layout_gives_the_same_numbers():
    expected, expected_lse = sagert.attention(Q, K, V, enable_gqa=True, return_lse=True)
    q, k, v = (t.transpose(1, 2).contiguous() for t in (Q, K, V))
    out, lse = sagert.attention(q, k, v, enable_gqa=True, return_lse=True, layout="BSHD")
    assert out.shape == (2, 37, 4, 48)
    assert out.is_contiguous()
    assert torch.equal(out.transpose(1, 2), expected)
    assert torch.equal(lse, expected_lse)


def test_output_keeps_the_memory_order_of_q():
    q = Q.transpose(1, 2).contiguous().transpose(1, 2)
    assert sagert.attention(q, K, V, enable_gqa=True).stride() == q.stride()
    assert sagert.attention(Q, K, V, enable_gqa=True).stride() == Q.stride()


def strided(t, kind):
    if kind == "last":
        return torch.stack([t, t], -1)[..., 0]
    if kind == "offset":
        return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)
    if kind == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]]


@pytest.mark.parametrize("kind", ["last", "offset", "transposed", "packed"])
def test_strides_do_not_change_the_result(kind):
    expected = sagert.attention(Q, K, V, enable_gqa=True)
    out = sagert.attention(*(strided(t, kind) for t in (Q, K, V)), enable_gqa=True)
    assert torch.equal(out, expected)


def test_expanded_inputs():
    k = K[:1].expand(2, 2, 53, 48)
    out = sagert.attention(Q, k, k, enable_gqa=True)
    assert torch.equal(out, sagert.attention(Q, k.contiguous(), k.contiguous(), enable_gqa=True))


def test_inputs_are_not_modified():
    copies = [t.clone() for t in (Q, K, V)]
    sagert.attention(Q, K, V, enable_gqa=True, precision="int8_fp8")
    assert all(torch.equal(a, b) for a, b in zip((Q, K, V), copies, strict=True))


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_out(layout):
    q, k, v = (t if layout == "BHSD" else t.transpose(1, 2).contiguous() for t in (Q, K, V))
    out = torch.full_like(q, math.nan)
    result, lse = sagert.attention(q, k, v, enable_gqa=True, out=out, layout=layout, return_lse=True)
    expected, expected_lse = sagert.attention(q, k, v, enable_gqa=True, layout=layout, return_lse=True)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_grouped_heads_equal_repeated_heads():
    out = sagert.attention(Q, K, V, enable_gqa=True)
    repeated = sagert.attention(Q, K.repeat_interleave(2, 1), V.repeat_interleave(2, 1))
    assert torch.equal(out, repeated)


def test_scale():
    out = sagert.attention(Q, K, V, enable_gqa=True, scale=0.5)
    exact, _ = reference.exact_attention(Q, K, V, scale=0.5)
    assert reference.error_metrics(out, exact)["relative_l1"] < 0.04


def test_no_key():
    out, lse = sagert.attention(Q, K[:, :, :0], V[:, :, :0], enable_gqa=True, return_lse=True)
    assert torch.equal(out, torch.zeros_like(Q))
    assert torch.equal(lse, torch.full((2, 4, 37), -math.inf))


@pytest.mark.parametrize("shape", [(0, 4, 37, 48), (2, 4, 0, 48)])
def test_no_query(shape):
    q = Q.new_zeros(shape)
    b = shape[0]
    assert sagert.attention(q, K[:b], V[:b], enable_gqa=True).shape == shape


def test_value_head_dim_may_differ():
    v = V[..., :16]
    out = sagert.attention(Q, K, v, enable_gqa=True)
    assert out.shape == (2, 4, 37, 16)
    assert torch.equal(out, sagert.attention(Q, K, V, enable_gqa=True)[..., :16])


@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8"])
def test_smoothing_is_exact_under_softmax(precision):
    biased = (K.float() + 8 * torch.randn(1, 2, 1, 48, generator=torch.Generator().manual_seed(5))).half()
    exact, exact_lse = reference.exact_attention(Q, biased, V)
    on, on_lse = sagert.attention(Q, biased, V, enable_gqa=True, precision=precision, return_lse=True)
    off = sagert.attention(Q, biased, V, enable_gqa=True, precision=precision, smooth_k=False)
    on_error = reference.error_metrics(on, exact)["relative_l1"]
    assert on_error < reference.error_metrics(off, exact)["relative_l1"]
    assert (on_lse - exact_lse).abs().max() < 0.03


def test_same_bits_twice():
    first = sagert.attention(Q, K, V, enable_gqa=True, precision="int8_fp8")
    assert torch.equal(first, sagert.attention(Q, K, V, enable_gqa=True, precision="int8_fp8"))


def test_autocast_is_left_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sagert.attention(Q, K, V, enable_gqa=True)
    assert out.dtype == torch.float16
    assert torch.equal(out, sagert.attention(Q, K, V, enable_gqa=True))
