# SPDX-License-Identifier: Apache-2.0
"""The masks' benchmark: its masks hide what their names say, and a ratio is held to the right side of its bar."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import masks  # noqa: E402
from timing import Timing  # noqa: E402

CPU = torch.device("cpu")


def took(milliseconds):
    return Timing(milliseconds, milliseconds, milliseconds, 1)


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_half_of_the_blocks(length):
    mask = masks.half_of_the_blocks(length, CPU)
    tiles = mask.view(length // 128, 128, length // 128, 128).transpose(1, 2)
    assert (tiles.flatten(2).all(-1) | ~tiles.flatten(2).any(-1)).all()
    assert mask.float().mean() == 0.5
    assert mask.any(-1).all()


@pytest.mark.parametrize("length", [1024, 4096])
def test_band_of_half(length):
    mask = masks.band_of_half(length, CPU)
    assert 0.5 <= mask.float().mean() <= 0.54
    assert mask.diagonal().all()


def test_contenders_compare_with_one_another():
    ways = masks.contenders(256, CPU)
    names = [way.name for way in ways]
    assert len(set(names)) == len(names)
    assert {way.against for way in ways} <= set(names)
    assert [way.name for way in ways if way.at_most] == ["fp16 mask", "bf16 mask", "fp32 mask"]


def test_visible_follows_the_call():
    rows = torch.tensor([0, 5, 9])
    causal = masks.visible({"causal": True, "window": (2, 0)}, rows, 10)
    assert causal.long().sum(-1).tolist() == [1, 3, 3]
    assert masks.visible({"mask": torch.eye(10, dtype=torch.bool)}, rows, 10).nonzero()[:, 1].tolist() == [0, 5, 9]
    assert masks.visible({"mask": torch.zeros(10, 10)}, rows, 10).all()


def test_bars():
    mask = masks.Contender("fp16 mask", at_most=1.25)
    assert masks.compared(took(1.2), took(1.0), mask)["met"]
    assert not masks.compared(took(1.3), took(1.0), mask)["met"]
    half = masks.Contender("half", at_least=1.7)
    assert masks.compared(took(0.5), took(1.0), half)["met"]
    missed = {"name": "half", "ms": 0.7} | masks.compared(took(0.7), took(1.0), half)
    assert not missed["met"]
    assert "MISSED" in masks.line(missed)
    assert masks.compared(took(1.0), took(1.0), masks.Contender("no mask")) == {}


def test_slice_error_of_the_exact_result():
    q, k, v = (torch.randn(1, 2, 64, 16, dtype=torch.float64) for _ in range(3))
    seen = masks.visible({"causal": True}, torch.arange(56, 64), 64)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert masks.slice_error(out, q, k, v, seen) < 1e-12
    assert masks.slice_error(2 * out, q, k, v, seen) == pytest.approx(1.0)
