# SPDX-License-Identifier: Apache-2.0
"""The feature tests' cases: every kind, head dim, mask and layout occurs, and what a case says is what is built."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import feature_run  # noqa: E402
from feature_cases import CASES, EVERYTHING, KINDS, Limits, drawn, generated  # noqa: E402
from feature_masks import BIASES, DTYPES, PATTERNS, SHAPES, MaskSpec, draw_mask  # noqa: E402
from feature_masks import MEMORY as MASK_MEMORY  # noqa: E402
from gpu_kit import MEMORY, place  # noqa: E402

import sagert  # noqa: E402

CPU = torch.device("cpu")


def features_of(case):
    present = {
        "causal": case.causal,
        "bottom_right": case.bottom_right,
        "window": case.window,
        "mask": case.mask,
        "varlen": case.segments,
    }
    return {name for name, there in present.items() if there}


def test_generated_cases_have_everything():
    cases = generated(CASES)
    assert cases == generated(CASES)
    assert {c.head_dim for c in cases} == set(range(1, 257))
    assert any(c.head_dim_v != c.head_dim for c in cases)
    assert {m for c in cases for m in c.memory} == set(MEMORY)
    masks = [c.mask for c in cases if c.mask]
    assert {(m.pattern, m.dtype) for m in masks} == {(p, d) for p in PATTERNS for d in DTYPES}
    assert {(m.shape, m.dtype) for m in masks} == {(s, d) for s in SHAPES for d in DTYPES}
    assert {m.memory for m in masks} == set(MASK_MEMORY)
    assert {m.bias for m in masks} == set(BIASES)
    packed = [c.segments for c in cases if c.segments]
    assert any(q and not k for s in packed for q, k in s)
    assert any(k and not q for s in packed for q, k in s)
    assert any(c.seqlen_k == 0 for c in cases)
    assert any(c.bottom_right and c.seqlen_q > c.seqlen_k for c in cases)
    for features in KINDS.values():
        alike = [
            c for c in cases if bool(c.mask) == ("mask" in features) and bool(c.segments) == ("varlen" in features)
        ]
        assert any(
            (c.causal, bool(c.window), c.bottom_right)
            == ("causal" in features, "window" in features, "bottom_right" in features)
            for c in alike
        )


def test_generated_cases_keep_within_limits():
    plain = generated(200, Limits(128, frozenset({"causal", "lse"})))
    assert max(c.head_dim for c in plain) == 128
    assert all(c.plain for c in plain)


def test_drawn_requests_repeat_and_differ():
    first = [drawn(i, 7) for i in range(40)]
    assert first == [drawn(i, 7) for i in range(40)]
    assert len(set(first)) == 40
    assert first != [drawn(i, 8) for i in range(40)]
    assert len({str(c) for c in first}) == 40


@pytest.mark.usefixtures("library")
def test_the_cases_reach_every_row_and_flag():
    device = sagert.Device((9, 0))
    rows = [r for r in sagert.kernels() if r.capability_min <= device.capability <= r.capability_max]
    limits = Limits.of(rows)
    assert limits.flags <= EVERYTHING.flags
    wrong = feature_run.coverage_failures(generated(CASES, limits), rows, device)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("memory", MEMORY)
def test_place_with_margin(memory):
    values = torch.randn(2, 3, 5, 4)
    view, whole = place(values, memory, 7.0, margin=16)
    assert torch.equal(view, values)
    assert (whole[:16] == 7.0).all()
    assert (whole[-16:] == 7.0).all()
    assert int((whole == 7.0).sum()) == whole.numel() - values.numel()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_broadcast(pattern):
    sizes = (2, 3, 130, 140)
    for index, shape in enumerate(SHAPES):
        spec = MaskSpec(pattern, DTYPES[index % 4], shape, MASK_MEMORY[index % len(MASK_MEMORY)], "normal")
        mask, again = (draw_mask(spec, sizes, torch.Generator().manual_seed(3), CPU)[0] for _ in range(2))
        assert mask.dtype == spec.dtype
        assert mask.dim() == len(shape)
        assert mask.expand(sizes).shape == sizes
        assert torch.equal(mask, again)
        if shape == "bhqk":
            assert PATTERNS[pattern](sizes, torch.Generator().manual_seed(3), CPU).any() == (pattern != "nothing")


def test_lowest_keeps_a_key():
    spec = MaskSpec("nothing", torch.float32, "qk", "bhsd", "lowest")
    mask, _ = draw_mask(spec, (1, 1, 5, 9), torch.Generator(), CPU)
    assert (mask[:, 0] == 0).all()
    assert (mask[:, 1:] == torch.finfo(torch.float32).min).all()
