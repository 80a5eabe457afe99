# SPDX-License-Identifier: Apache-2.0
"""The feature tests' float64 oracle: against torch's own attention, and where queries see nothing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import feature_oracle  # noqa: E402
from feature_oracle import exact, exact_varlen, positions_see  # noqa: E402

NAN, INF = float("nan"), float("inf")


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen_by_hand(s, sk, causal, bottom_right, window):
    seen = torch.zeros(s, sk, dtype=torch.bool)
    for i in range(s):
        position = i + (sk - s if bottom_right else 0)
        for j in range(sk):
            left, right = window or (None, None)
            seen[i, j] = (
                (not causal or j <= position)
                and (left in (None, -1) or j >= position - left)
                and (right in (None, -1) or j <= position + right)
            )
    return seen


@pytest.mark.parametrize("window", [None, (3, 2), (None, 1), (4, -1), (0, 0)])
@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "sk"), [(9, 9), (5, 12), (12, 5)])
def test_positions_by_hand(s, sk, causal, bottom_right, window):
    got = positions_see(torch.arange(s), s, sk, causal, bottom_right, window)
    assert torch.equal(got, seen_by_hand(s, sk, causal, bottom_right, window))
    some = torch.tensor([s - 1, 0])
    assert torch.equal(positions_see(some, s, sk, causal, bottom_right, window), got[some])


@pytest.mark.parametrize("shape", [(2, 6, 11, 17), (11, 17), (2, 1, 1, 17), (6, 11, 1), (17,), (1, 1)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_against_torch(shape, kind, monkeypatch):
    monkeypatch.setattr(feature_oracle, "CHUNK_SCORES", 2 * 6 * 17 * 4)  # four queries at a time
    q, k, v = draw(2, 6, 11, 8), draw(2, 3, 17, 8, seed=1), draw(2, 3, 17, 5, seed=2)
    values = draw(*shape, seed=3)
    mask = values > -0.5 if kind == "bool" else values.masked_fill(values > 1.0, -INF)
    window = (9, 4)
    got, lse = exact(q, k, v, mask=mask, causal=True, bottom_right=True, window=window)
    seen = seen_by_hand(11, 17, True, True, window).expand(2, 6, 11, 17)
    whole = mask.expand(2, 6, 11, 17)
    seen = seen & whole if kind == "bool" else seen & (whole != -INF)
    bias = torch.zeros(seen.shape, dtype=torch.float64) if kind == "bool" else whole.masked_fill(~seen, 0.0)
    bias = bias.masked_fill(~seen, -INF)
    k6, v6 = (t.repeat_interleave(2, 1) for t in (k, v))
    blind = ~seen.any(-1)
    want = torch.nn.functional.scaled_dot_product_attention(q, k6, v6, bias.masked_fill(blind[..., None], 0.0))
    want_lse = torch.logsumexp(q @ k6.transpose(-1, -2) * 8**-0.5 + bias, -1)
    assert torch.allclose(got, want.masked_fill(blind[..., None], 0.0), atol=1e-12)
    assert torch.allclose(lse, want_lse, atol=1e-12)
    rows = torch.tensor([10, 0, 3])
    part, part_lse = exact(q, k, v, mask=mask, causal=True, bottom_right=True, window=window, rows=rows)
    # Not the same bits: how a matrix product rounds depends on its shape on some processors.
    assert torch.allclose(part, got[:, :, rows], rtol=0.0, atol=1e-14)
    assert torch.allclose(part_lse, lse[:, :, rows], rtol=0.0, atol=1e-14)


def test_nonfinite_values_reach_only_those_who_see_them():
    q, k, v = draw(1, 2, 6, 4), draw(1, 2, 6, 4, seed=1), draw(1, 2, 6, 4, seed=2)
    v[0, 0, 3, 1], v[0, 0, 5, 1], v[0, 1, 2, 0], k[0, 1, 5, 0] = INF, -INF, NAN, NAN
    out, lse = exact(q, k, v, causal=True)
    assert torch.isposinf(out[0, 0, :, 1]).tolist() == [False, False, False, True, True, False]
    assert torch.isnan(out[0, 0, :, 1]).tolist() == [False] * 5 + [True]  # +Inf and -Inf together
    assert torch.isnan(out[0, 1, :, 0]).tolist() == [False, False, True, True, True, True]
    assert torch.isnan(out[0, 1, :, 1]).tolist() == [False] * 5 + [True]
    assert torch.isnan(lse[0]).nonzero().tolist() == [[1, 5]]


def test_blind_queries():
    q, k, v = draw(1, 1, 4, 4), draw(1, 1, 3, 4, seed=1), draw(1, 1, 3, 2, seed=2)
    v[..., 0] = NAN
    q[0, 0, 1] = NAN
    mask = torch.tensor([[True], [False], [False], [True]])
    out, lse = exact(q, k, v, mask=mask)
    assert torch.equal(out[0, 0, 1:3], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.isneginf(lse[0, 0]).tolist() == [False, True, True, False]
    out, lse = exact(q, k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_packed_sequences_are_separate():
    segments = ((3, 4), (0, 2), (5, 0), (2, 6))
    q, k, v = draw(10, 4, 8), draw(12, 2, 8, seed=1), draw(12, 2, 6, seed=2)
    out, lse = exact_varlen(q, k, v, segments, causal=True, bottom_right=True)
    assert out.shape == (10, 4, 6)
    assert lse.shape == (4, 10)
    first, first_lse = exact(
        q[None, :3].transpose(1, 2), k[None, :4].transpose(1, 2), v[None, :4].transpose(1, 2), causal=True,
        bottom_right=True,
    )  # fmt: skip
    assert torch.equal(out[:3], first[0].transpose(0, 1))
    assert torch.equal(lse[:, :3], first_lse[0])
    assert not out[3:8].any()
    assert torch.isneginf(lse[:, 3:8]).all()
