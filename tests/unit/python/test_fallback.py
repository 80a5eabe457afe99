# SPDX-License-Identifier: Apache-2.0
"""fallback="sdpa": the exact result with every feature SDPA can express, warned about once and counted."""

from __future__ import annotations

import math
import warnings

import pytest

torch = pytest.importorskip("torch")
import sagert  # noqa: E402
from sagert import reference, sdpa  # noqa: E402
from sagert.errors import UnsupportedError  # noqa: E402
from sagert.fallback import FallbackWarning  # noqa: E402
from sagert.visibility import pattern  # noqa: E402


def make(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = make(2, 4, 16, 32), make(2, 2, 24, 32, seed=1), make(2, 2, 24, 16, seed=2)
BOOL = torch.rand(16, 24, generator=torch.Generator().manual_seed(3)) > 0.5
BOOL[5] = False
FLOAT = make(4, 16, 24, seed=4, dtype=torch.float32).masked_fill(~BOOL, -math.inf)
PATTERNS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"window": (2, 1)},
    {"window": (3, None), "is_causal": True, "causal_alignment": "bottom_right"},
]


@pytest.mark.parametrize("options", PATTERNS)
@pytest.mark.parametrize("mask", [None, BOOL, FLOAT, FLOAT.half()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_feature(options, mask, dtype):
    q, k, v = (t.to(dtype) for t in (Q, K, V))
    out = sdpa.attention(
        q,
        k,
        v,
        mask,
        0.0,
        pattern(**{"is_causal": False, "window": None, "causal_alignment": "top_left", **options}),
        0.3,
    )
    exact, lse = reference.exact_attention(q, k, v, scale=0.3, attn_mask=mask, **options)
    assert out.dtype == dtype
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-5 if mask is not None and mask.is_floating_point() else 1e-9
    torch.testing.assert_close(out.double(), exact, atol=loose, rtol=loose)
    assert (out[lse == -math.inf] == 0).all()


def test_no_keys():
    assert (sdpa.attention(Q, K[:, :, :0], V[:, :, :0], None, 0.0, pattern(True, None, "top_left"), 1.0) == 0).all()


def test_runs_in_the_precision_it_is_given_and_warns_once():
    before = sagert.stats()["fallback_calls"]
    with pytest.warns(FallbackWarning, match="cast to"):
        out = sagert.attention(Q, K, V, attn_mask=BOOL, enable_gqa=True, fallback="sdpa")
    exact, _ = reference.exact_attention(Q, K, V, attn_mask=BOOL)
    torch.testing.assert_close(out, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sagert.attention(Q, K, V, window=(3, 3), enable_gqa=True, fallback="sdpa")
    assert sagert.stats()["fallback_calls"] == before + 2


def test_layout_and_out():
    q, k, v = (t.transpose(1, 2).contiguous() for t in (Q, K, V))
    out = torch.full((2, 16, 4, 16), math.nan, dtype=torch.float64)
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    sagert.attention(q, k, v, enable_gqa=True, layout="BSHD", out=out, fallback="sdpa", **options)
    torch.testing.assert_close(out.transpose(1, 2), reference.exact_attention(Q, K, V, **options)[0])


@pytest.mark.parametrize("options", PATTERNS)
def test_packed_sequences(options):
    q, k, v = make(30, 4, 32), make(40, 2, 32, seed=1), make(40, 2, 16, seed=2)
    cu_q = torch.tensor([0, 10, 10, 18, 30], dtype=torch.int32)
    cu_k = torch.tensor([0, 15, 20, 20, 40], dtype=torch.int32)
    call = (q, k, v, cu_q, cu_k, 12, 20)
    out = sagert.attention_varlen(*call, enable_gqa=True, fallback="sdpa", **options)
    for i in range(4):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        parts = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        exact, _ = reference.exact_attention(*parts, **options)
        torch.testing.assert_close(out[rows], exact[0].transpose(0, 1))


def test_gradients_and_dropout_run_on_sdpa():
    q = Q.float().requires_grad_()
    with pytest.warns(FallbackWarning, match="differentiable"):
        out = sagert.attention(q, K.float(), V.float(), attn_mask=BOOL, enable_gqa=True, fallback="sdpa")
    out.sum().backward()
    assert torch.isfinite(q.grad).all()
    with pytest.warns(FallbackWarning, match="dropout_p=1.0"):
        dropped = sagert.attention(Q, K, V, dropout_p=1.0, enable_gqa=True, fallback="sdpa")
    assert (dropped == 0).all()
    cu_q, cu_k = torch.tensor([0, 16], dtype=torch.int32), torch.tensor([0, 24], dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = sagert.attention_varlen(
            Q[0].transpose(0, 1).requires_grad_(), K[0].transpose(0, 1), V[0].transpose(0, 1), cu_q, cu_k, 16, 24,
            enable_gqa=True, fallback="sdpa",
        )  # fmt: skip
    assert packed.requires_grad


def test_vmap_runs_on_sdpa():
    with pytest.warns(FallbackWarning, match="transforms"):
        out = torch.func.vmap(lambda q: sagert.attention(q, K, V, enable_gqa=True, fallback="sdpa"))(
            torch.stack([Q, 2 * Q])
        )
    torch.testing.assert_close(out[1], reference.exact_attention(2 * Q, K, V)[0])


def test_the_lse_cannot_fall_back():
    with pytest.raises(UnsupportedError):
        sagert.attention(Q, K, V, enable_gqa=True, fallback="sdpa", return_lse=True)
    with pytest.raises(UnsupportedError, match="dropout"):
        sagert.attention(Q, K, V, enable_gqa=True, dropout_p=0.5, fallback="sdpa", return_lse=True)
