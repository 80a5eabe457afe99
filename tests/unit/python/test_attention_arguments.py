# SPDX-License-Identifier: Apache-2.0
"""attention(): malformed calls name the argument, its value and what is accepted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert.errors import InvalidArgumentError, SagertError, UnsupportedError  # noqa: E402


def make(*shape, dtype=torch.float16):
    return torch.randn(shape, dtype=torch.float32).to(dtype)


Q = make(2, 4, 16, 32)
K = make(2, 4, 24, 32)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((Q[0], K, K), {}, ("q has 3 dimensions", "unsqueeze(0)")),
        ((Q, K[0], K), {}, ("k has 3 dimensions", "B, H, S, D")),
        ((Q, K, K[0, 0]), {}, ("v has 2 dimensions",)),
        (("x", K, K), {}, ("q is a str", "torch.Tensor")),
        ((Q, K.bfloat16(), K), {}, ("k has dtype torch.bfloat16", "q has torch.float16")),
        ((Q, K, K.float()), {}, ("v has dtype torch.float32",)),
        ((Q, K.to("meta"), K), {}, ("k is on meta", "q is on cpu")),
        ((Q, K[:1], K[:1]), {}, ("batch sizes", "2, 1, 1")),
        ((Q, K[..., :16], K), {}, ("head dims of q and k are 32 and 16",)),
        ((Q, K, K[:, :, :8]), {}, ("heads and sequence lengths",)),
        ((Q, K[:, :2], K[:, :2]), {}, ("4 heads", "enable_gqa=True")),
        ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}, ("multiple",)),
        ((Q, K, K), {"layout": "HND"}, ("layout='HND'", "'BHSD' or 'BSHD'")),
        ((Q, K, K), {"precision": "fp4"}, ("precision='fp4'", "'int8_fp16'")),
        ((Q, K, K), {"precision": None}, ("precision=None",)),
        ((Q, K, K), {"scale": float("nan")}, ("scale=nan",)),
        ((Q, K, K), {"scale": "big"}, ("scale='big'",)),
        ((Q, K, K), {"dropout_p": 1.5}, ("dropout_p=1.5",)),
        ((Q, K, K), {"fallback": "maybe"}, ("fallback='maybe'", "'error' or 'sdpa'")),
        ((Q, K, K), {"out": make(2, 4, 16, 16)}, ("out has shape (2, 4, 16, 16)", "(2, 4, 16, 32)")),
        ((Q, K, K), {"out": make(2, 4, 16, 32, dtype=torch.bfloat16)}, ("out is torch.bfloat16",)),
        ((Q, K, K), {"out": Q}, ("out shares memory with q",)),
        ((Q, K, K), {"out": make(2, 4, 1, 32).expand(2, 4, 16, 32)}, ("out is an expanded tensor",)),
        ((Q, K, K), {"out": 3}, ("out is a int",)),
        ((Q, K), {}, ("v is a NoneType",)),
        ((Q, K, K), {"dropout_p": "x"}, ("dropout_p='x'",)),
        ((Q, K, K), {"attn_mask": True}, ("attn_mask is a bool", "torch.Tensor")),
        ((Q, K, K), {"attn_mask": torch.ones(16, 24, dtype=torch.int32)}, ("torch.int32", "torch.bool")),
        ((Q, K, K), {"attn_mask": torch.ones(16, 23)}, ("(16, 23)", "[2, 4, 16, 24]")),
        ((Q, K, K), {"attn_mask": torch.ones(3, 1, 16, 24)}, ("(3, 1, 16, 24)",)),
        ((Q, K, K), {"attn_mask": torch.ones(1, 2, 4, 16, 24)}, ("(1, 2, 4, 16, 24)",)),
        ((Q, K, K), {"attn_mask": torch.ones(24, device="meta")}, ("attn_mask is on meta", "q is on cpu")),
        ((Q, K, K), {"attn_mask": torch.ones(16, 24).to_sparse()}, ("attn_mask has layout",)),
        ((Q, K, K), {"causal_alignment": "right"}, ("causal_alignment='right'", "'bottom_right'")),
        ((Q, K, K), {"window": 5}, ("window=5", "(left, right)")),
        ((Q, K, K), {"window": (1, 2, 3)}, ("window=(1, 2, 3)",)),
        ((Q, K, K), {"window": (-2, 3)}, ("left is -2",)),
        ((Q, K, K), {"window": (2, 0.5)}, ("right is 0.5",)),
        ((Q, K, K), {"window": (True, 1)}, ("left is True",)),
        ((Q, K, K), {"out": K[:, :, :16], "attn_mask": None}, ("out shares memory with k",)),
    ],
)
def test_malformed_call(arguments, options, words):
    with pytest.raises(InvalidArgumentError) as raised:
        sagert.attention(*arguments, **options)
    assert isinstance(raised.value, ValueError)
    for word in words:
        assert word in str(raised.value)


def test_out_inside_an_input_is_refused():
    packed = make(2, 4, 48, 32)
    q, k = packed[:, :, :16], packed[:, :, 16:]
    with pytest.raises(InvalidArgumentError, match="out shares memory"):
        sagert.attention(q, k, k, out=packed[:, :, 8:24])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"precision": "nvfp4"}, "nvfp4"),
        ({"precision": "int4_fp8"}, "the reference of CPU tensors has no such recipe"),
    ],
)
def test_unsupported_call(options, word):
    with pytest.raises(UnsupportedError) as raised:
        sagert.attention(Q, K, K, **options)
    assert isinstance(raised.value, NotImplementedError)
    assert isinstance(raised.value, SagertError)
    assert word in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_with_the_cast(dtype):
    with pytest.raises(UnsupportedError, match=r"cast to torch\.float16 or torch\.bfloat16"):
        sagert.attention(Q.to(dtype), K.to(dtype), K.to(dtype))


def test_gradients_are_refused_while_grad_mode_is_on():
    q = Q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="backward"):
        sagert.attention(q, K, K)
    with pytest.raises(UnsupportedError, match="backward"):
        torch.ops.sagert.attention(q, K, K, None, 1.0, False, 0, True, False)
    with torch.no_grad():
        assert sagert.attention(q, K, K).shape == Q.shape


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        sagert.flash  # noqa: B018
