# SPDX-License-Identifier: Apache-2.0
"""The portable kernels, executed by Triton's interpreter, against the reference and against exact attention."""

import itertools
import math

import harness
import pytest
import torch

from sagert import reference

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("int8_fp16", "int8_fp8")
BARS = {"int8_fp16": 0.0135, "int8_fp8": 0.039}

# B, H, Hk, S, Sk, D
SHAPES = [
    (1, 1, 1, 1, 1, 64),
    (1, 2, 1, 65, 129, 64),
    (2, 2, 2, 63, 70, 128),
    (1, 4, 1, 17, 200, 40),
    (1, 1, 1, 130, 64, 72),
    (1, 2, 2, 5, 3, 1),
    (1, 3, 1, 64, 128, 128),
]


def make(shape, dtype, seed=0):
    b, h, hk, s, sk, d = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, m, d, generator=generator).to(dtype) for n, m in ((h, s), (hk, sk), (hk, sk)))
    return q, k + 1.5, v


def relative_l1(actual, expected):
    return float((actual.double() - expected.double()).abs().sum() / expected.double().abs().sum())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_and_is_near_exact(shape, dtype, precision, causal):
    q, k, v = make(shape, DTYPES[dtype])
    out, lse = harness.run(q, k, v, precision=precision, causal=causal)
    expected, expected_lse = reference.attention(q, k, v, is_causal=causal, precision=precision, block_n=64)
    exact, exact_lse = reference.exact_attention(q, k, v, is_causal=causal)
    # Against the reference: the same rounding but for the order of sums, which can move one P by one e4m3 step.
    assert relative_l1(out, expected) < (4e-3 if precision == "int8_fp8" else 2e-3)
    assert relative_l1(out, exact) < max(BARS[precision] * 1.3, 0.02 if dtype == "bf16" else 0)
    # The K shift is a sum taken in another order: rarely, a value at a rounding boundary becomes the next integer.
    assert float((lse - expected_lse).abs().max()) < 4e-3
    assert float((lse - expected_lse).abs().median()) < 1e-5
    assert float((lse - exact_lse).abs().max()) < 0.08


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiles", [(64, 128), (128, 64), (128, 128)], ids=str)
def test_every_shipped_tile(tiles, precision):
    q, k, v = make((1, 2, 1, 150, 300, 64), torch.float16)
    for causal in (False, True):
        out, _ = harness.run(q, k, v, precision=precision, causal=causal, tiles=tiles)
        expected, _ = reference.attention(q, k, v, is_causal=causal, precision=precision, block_n=tiles[1])
        assert relative_l1(out, expected) < 4e-3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp16_carries_int8_exactly(precision):
    q, k, v = make((1, 2, 1, 70, 150, 128), torch.bfloat16)
    out, lse = harness.run(q, k, v, precision=precision)
    carried, carried_lse = harness.run(q, k, v, precision=precision, carrier=torch.float16)
    assert torch.equal(out, carried)
    assert torch.equal(lse, carried_lse)


def _transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(x):
    return torch.nn.functional.pad(x, (3, 5, 1, 2))[:, :, 1:-2, 3:-5]


def _channel_strided(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]


def _last_axis_first(x):
    return x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("view", [_transposed, _sliced, _channel_strided, _last_axis_first])
def test_strides_do_not_change_the_result(view, precision):
    q, k, v = make((2, 2, 1, 33, 70, 64), torch.float16)
    expected, expected_lse = harness.run(q, k, v, precision=precision, causal=True)
    out = view(torch.full_like(q, float("nan")))
    actual, lse = harness.run(view(q), view(k), view(v), precision=precision, causal=True, out=out)
    assert torch.equal(actual, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("tensor", "value"), list(itertools.product("qkv", [float("nan"), float("inf"), float("-inf")])), ids=str
)
def test_non_finite_values_reach_exactly_the_outputs_that_see_them(tensor, value, causal, precision):
    q, k, v = make((1, 2, 1, 70, 70, 64), torch.float16)
    q[..., 7] += torch.where(q[..., 7] < 0, -0.5, 0.5)  # 0 * inf: a query that rounds to 0 there has NaN scores
    {"q": q, "k": k, "v": v}[tensor][0, 0, 40, 7] = value
    out, _ = harness.run(q, k, v, precision=precision, causal=causal)
    exact, _ = reference.exact_attention(q, k, v, is_causal=causal)
    assert torch.equal(out.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    assert float((out.double() - exact)[finite].abs().sum()) <= 0.06 * float(exact[finite].abs().sum())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_inputs(precision):
    q, k, v = make((1, 1, 1, 20, 40, 64), torch.float16)
    v[..., 3] = 0
    out, _ = harness.run(q, torch.zeros_like(k), v, precision=precision)
    torch.testing.assert_close(out, v.float().mean(2, keepdim=True).expand_as(out).half(), rtol=0, atol=0.02)
    assert not out[..., 3].any()
    out, lse = harness.run(torch.zeros_like(q), k, torch.zeros_like(v), precision=precision)
    assert not out.any()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(40)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_keys_give_zero_and_minus_infinity(precision):
    q, k, v = make((1, 2, 1, 5, 0, 64), torch.float16)
    out, lse = harness.run(q, k, v, precision=precision)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scale_and_smoothing(precision):
    q, k, v = make((1, 1, 1, 40, 90, 64), torch.bfloat16)
    for scale in (0.3, -0.2, 0.0):
        out, lse = harness.run(q, k, v, precision=precision, scale=scale)
        exact, exact_lse = reference.exact_attention(q, k, v, scale=scale)
        assert relative_l1(out, exact) < 0.06
        assert float((lse - exact_lse).abs().max()) < 0.2
    smooth, _ = harness.run(q, k + 8, v, precision=precision)
    rough, _ = harness.run(q, k + 8, v, precision=precision, smooth_k=False)
    exact, _ = reference.exact_attention(q, k + 8, v)
    assert relative_l1(smooth, exact) < relative_l1(rough, exact)
