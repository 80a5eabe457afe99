# SPDX-License-Identifier: Apache-2.0
"""The contenders of the benchmarks: which there are, and what a named row stands for."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("torch")
import peers

ROWS = [types.SimpleNamespace(id="sm80.a", precision="int8_fp16"), types.SimpleNamespace(id="sm80.b", precision="x")]


def _names(contenders: list[peers.Peer]) -> list[tuple[str, str]]:
    return [(peer.name, peer.timed) for peer in contenders]


def test_rows_stand_in_the_place_of_precisions() -> None:
    mine = [("sagert sm80.a", "kernel"), ("sagert sm80.a", "end to end")]
    assert _names(peers.contenders(["int8_fp16"], ["sm80.a"]))[:2] == mine
    plain = _names(peers.contenders(["int8_fp16"]))
    assert plain[:2] == [("sagert int8_fp16", "kernel"), ("sagert int8_fp16", "end to end")]
    assert _names(peers.contenders(["int8_fp16"], ["sm80.a"]))[2:] == plain[2:]
    assert len(set(plain)) == len(plain)


def test_both_accumulators_of_sageattention_are_timed_both_ways() -> None:
    found = {name for name in _names(peers.contenders([])) if name[0].startswith("SageAttention int8_fp16")}
    accumulators = ("fp32", "fp16+fp32")
    assert found == {(f"SageAttention int8_fp16 ({a})", t) for a in accumulators for t in ("kernel", "end to end")}


def test_precision_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.sagert, "kernels", lambda: ROWS)
    assert peers.precision_of("sm80.a") == "int8_fp16"
    with pytest.raises(ValueError, match=r"row 'sm80\.c'; this sagert has: sm80\.a, sm80\.b"):
        peers.precision_of("sm80.c")
