# SPDX-License-Identifier: Apache-2.0
"""attention_varlen() on CPU tensors: against attention() of each sequence, and malformed calls."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert.errors import InvalidArgumentError, UnsupportedError  # noqa: E402


def make(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lengths(*values):
    return torch.tensor([0, *values]).cumsum(0).int()


Q, K, V = make(60, 4, 32), make(80, 2, 32, seed=1), make(80, 2, 24, seed=2)
CU_Q, CU_K = lengths(13, 0, 7, 30, 10), lengths(20, 5, 0, 30, 25)
LONGEST = (30, 30)
OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right", "window": (6, None)},
    {"window": (2, 3), "precision": "int8_fp8"},
    {"scale": 0.5, "smooth_k": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_each_sequence_is_its_own_attention(options):
    options = {**options, "enable_gqa": True, "return_lse": True}
    out, lse = sagert.attention_varlen(Q, K, V, CU_Q, CU_K, *LONGEST, validate=True, **options)
    assert out.shape == (60, 4, 24)
    assert lse.shape == (4, 60)
    for i in range(5):
        rows, keys = slice(CU_Q[i], CU_Q[i + 1]), slice(CU_K[i], CU_K[i + 1])
        parts = (t.transpose(0, 1)[None] for t in (Q[rows], K[keys], V[keys]))
        expected, expected_lse = sagert.attention(*parts, **options)
        assert torch.equal(out[rows], expected[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], expected_lse[0])
    assert (out[13:20] == 0).all()  # the third sequence has no keys
    assert (lse[:, 13:20] == -math.inf).all()


def test_out_and_fp32():
    out = torch.full((60, 4, 24), math.nan)
    options = {"enable_gqa": True}
    result = sagert.attention_varlen(Q.float(), K.float(), V.float(), CU_Q, CU_K, *LONGEST, out=out, **options)
    assert result is out
    expected = sagert.attention_varlen(Q.bfloat16(), K.bfloat16(), V.bfloat16(), CU_Q, CU_K, *LONGEST, **options)
    assert torch.equal(out, expected.float())


def test_output_keeps_the_memory_order_of_q():
    q = Q.transpose(0, 1).contiguous().transpose(0, 1)
    out = sagert.attention_varlen(q, K, V[..., :1].expand(80, 2, 32), CU_Q, CU_K, *LONGEST, enable_gqa=True)
    assert out.stride() == q.stride()


def test_nothing_to_do():
    cu = torch.zeros(1, dtype=torch.int32)
    out, lse = sagert.attention_varlen(Q[:0], K[:0], V[:0], cu, cu, 0, 0, enable_gqa=True, return_lse=True)
    assert out.shape == (0, 4, 24)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": Q[None]}, ("q has 4 dimensions", "total, heads, head dim")),
        ({"k": K.float()}, ("k has dtype",)),
        ({"v": V[:70]}, ("heads and sequence lengths",)),
        ({"k": K[..., :16]}, ("head dims of q and k are 32 and 16",)),
        ({"enable_gqa": False}, ("enable_gqa=True",)),
        ({"cu_seqlens_q": [0, 60]}, ("cu_seqlens_q is a list", "int32")),
        ({"cu_seqlens_q": CU_Q.long()}, ("cu_seqlens_q has dtype torch.int64", "torch.int32")),
        ({"cu_seqlens_k": CU_K[None]}, ("cu_seqlens_k has shape (1, 6)",)),
        ({"cu_seqlens_k": CU_K[:0]}, ("cu_seqlens_k has shape (0,)",)),
        ({"cu_seqlens_k": CU_K.to("meta")}, ("cu_seqlens_k is on meta",)),
        ({"cu_seqlens_k": CU_K[:4]}, ("6 entries", "has 4")),
        ({"max_seqlen_q": -1}, ("max_seqlen_q is -1",)),
        ({"max_seqlen_k": 2.5}, ("max_seqlen_k is 2.5",)),
        ({"max_seqlen_k": torch.tensor(3)}, ("max_seqlen_k is tensor(3)",)),
        ({"window": (1,)}, ("window=(1,)",)),
        ({"scale": math.nan}, ("scale=nan",)),
        ({"precision": "int2"}, ("precision='int2'",)),
        ({"out": torch.empty(60, 4, 32, dtype=torch.float16)}, ("out has shape (60, 4, 32)", "(60, 4, 24)")),
        ({"cu_seqlens_q": CU_Q + 1, "validate": True}, ("cu_seqlens_q begins with 1",)),
        ({"cu_seqlens_k": lengths(20, 5, -5, 35, 25), "validate": True}, ("cu_seqlens_k falls from 25 to 20",)),
        ({"cu_seqlens_k": lengths(20, 5, 0, 30, 20), "validate": True}, ("cu_seqlens_k ends with 75", "80")),
        ({"max_seqlen_k": 29, "validate": True}, ("max_seqlen_k is 29", "sequence 3 has length 30")),
    ],
)
def test_malformed_call(changes, words):
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = dict(zip(names, (Q, K, V, CU_Q, CU_K, *LONGEST), strict=True))
    with pytest.raises(InvalidArgumentError) as raised:
        sagert.attention_varlen(**{**arguments, "enable_gqa": True, **changes})
    for word in words:
        assert word in str(raised.value)


def test_gradients_are_refused():
    with pytest.raises(UnsupportedError, match="backward"):
        sagert.attention_varlen(Q.clone().requires_grad_(), K, V, CU_Q, CU_K, *LONGEST, enable_gqa=True)
