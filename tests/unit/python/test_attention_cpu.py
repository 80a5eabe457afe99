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


@pytest.mark.parametrize("precision", ["auto", "int8_fp16", "int8_fp8", "int8_int8"])
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


@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8", "int8_int8"])
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


def bound(out, exact):
    return reference.error_metrics(out, exact)["relative_l1"]


MASKS = {
    "none": None,
    "bool": torch.rand(2, 4, 37, 53, generator=torch.Generator().manual_seed(3)) > 0.5,
    "keys": torch.rand(53, generator=torch.Generator().manual_seed(4)) > 0.3,
    "batch": torch.rand(2, 1, 1, 53, generator=torch.Generator().manual_seed(5)) > 0.3,
    "fp32": make(4, 37, 53, dtype=torch.float32, seed=6),
    "fp16": make(37, 53, seed=7),
    "bf16": make(2, 1, 37, 53, dtype=torch.bfloat16, seed=8),
    "strided": make(2, 4, 53, 37, dtype=torch.float32, seed=9).transpose(2, 3),
    "infinite": make(37, 53, seed=10).masked_fill(make(37, 53, seed=11) > 0, -math.inf),
}
PATTERNS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"window": (5, 3)},
    {"window": (None, 4), "causal_alignment": "bottom_right"},
    {"window": (0, -1)},
    {"is_causal": True, "window": (7, 2), "causal_alignment": "bottom_right"},
]


@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8", "int8_int8"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_patterns_against_exact(mask, pattern, precision):
    options = {**pattern, "attn_mask": MASKS[mask]}
    out, lse = sagert.attention(Q, K, V, enable_gqa=True, precision=precision, return_lse=True, **options)
    exact, exact_lse = reference.exact_attention(Q, K, V, **options)
    assert bound(out, exact) < 0.05
    blind = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert (out[blind] == 0).all()
    assert (lse - exact_lse)[~blind].abs().max() < 0.05


def test_patterns_are_their_masks():
    queries, keys = torch.arange(37)[:, None], torch.arange(53)[None, :]
    position = queries + 53 - 37
    mask = (keys >= position - 7) & (keys <= position)
    window = sagert.attention(
        Q, K, V, enable_gqa=True, is_causal=True, window=(7, None), causal_alignment="bottom_right"
    )
    assert torch.equal(window, sagert.attention(Q, K, V, mask, enable_gqa=True))
    additive = torch.zeros(37, 53).masked_fill(~mask, -math.inf)
    assert torch.equal(window, sagert.attention(Q, K, V, additive, enable_gqa=True))
    bshd = (t.transpose(1, 2) for t in (Q, K, V))
    out = sagert.attention(*bshd, mask, enable_gqa=True, layout="BSHD")
    assert torch.equal(out.transpose(1, 2), window)


def test_queries_before_all_keys_see_none():
    out, lse = sagert.attention(
        Q, K[:, :, :5], V[:, :, :5], enable_gqa=True, is_causal=True, return_lse=True, causal_alignment="bottom_right"
    )
    assert (out[:, :, :32] == 0).all()
    assert (lse[:, :, :32] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 32:]).all()


@pytest.mark.parametrize("values", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf)])
@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8", "int8_int8"])
def test_nonfinite_values_reach_what_sees_them(values, precision):
    v = V.clone()
    for index, value in enumerate(values):
        v[0, 1, 20 + 9 * index, 7] = value
    for options in ({"attn_mask": MASKS["bool"]}, {"window": (4, 4)}, {"attn_mask": MASKS["infinite"]}):
        out = sagert.attention(Q, K, v, enable_gqa=True, precision=precision, **options)
        exact, _ = reference.exact_attention(Q, K, v, **options)
        assert torch.equal(out.isnan(), exact.isnan())
        assert torch.equal(out == math.inf, exact == math.inf)
        assert torch.equal(out == -math.inf, exact == -math.inf)


def test_nan_in_a_mask_gives_nan():
    mask = torch.zeros(37, 53)
    mask[3, 4] = math.nan
    out = sagert.attention(Q, K, V, mask, enable_gqa=True)
    assert out[:, :, 3].isnan().all()
    assert not out[:, :, 4:].isnan().any()


@pytest.mark.parametrize(("dim", "dim_v"), [(1, 1), (40, 256), (256, 24), (200, 200), (33, 65)])
@pytest.mark.parametrize("precision", ["int8_fp16", "int8_fp8"])
def test_head_dims(dim, dim_v, precision):
    q, k, v = make(1, 2, 40, dim), make(1, 2, 150, dim, seed=1), make(1, 2, 150, dim_v, seed=2)
    out = sagert.attention(q, k, v, precision=precision)
    exact, _ = reference.exact_attention(q, k, v)
    assert out.shape == (1, 2, 40, dim_v)
    assert bound(out, exact) < 0.06


def test_fp32_is_computed_through_bf16():
    q, k, v = (t.float() for t in (Q, K, V))
    out, lse = sagert.attention(q, k, v, enable_gqa=True, return_lse=True)
    expected, expected_lse = sagert.attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), enable_gqa=True, return_lse=True
    )
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())
    assert torch.equal(lse, expected_lse)
    given = torch.full_like(q, math.nan)
    sagert.attention(q, k, v, enable_gqa=True, out=given)
    assert torch.equal(given, out)
