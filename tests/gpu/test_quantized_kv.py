# SPDX-License-Identifier: Apache-2.0
"""Keys and values quantized once: the bits of the one call, whatever becomes of k and v, on any stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import feature_run
import pytest
import torch
from feature_cases import FeatureCase, Limits, generated
from feature_masks import MaskSpec

import sagert

NAN = float("nan")
PLAIN = FeatureCase(
    index=3, batch=2, heads_kv=2, group=2, seqlen_q=200, seqlen_k=700, head_dim=128, head_dim_v=128,
    dtype=torch.bfloat16, memory=("bshd",) * 4,
)  # fmt: skip
CASES = {
    "plain": PLAIN,
    "causal": dataclasses.replace(PLAIN, causal=True, dtype=torch.float16, head_dim=64, head_dim_v=64),
    "split": dataclasses.replace(PLAIN, batch=1, heads_kv=1, group=1, seqlen_q=17, seqlen_k=8192),
    "many_tiles": dataclasses.replace(PLAIN, batch=3, heads_kv=12, group=4),  # more than there are thread blocks
    "one_query": dataclasses.replace(PLAIN, seqlen_q=1),
    "unaligned": dataclasses.replace(
        PLAIN, memory=("offset", "offset", "offset", "bhsd"), head_dim=100, head_dim_v=100
    ),
    "rough": dataclasses.replace(PLAIN, smooth_k=False),
    "wide": dataclasses.replace(PLAIN, head_dim=256, head_dim_v=256),
    "narrow_v": dataclasses.replace(PLAIN, head_dim_v=64),
    "bool_mask": dataclasses.replace(PLAIN, mask=MaskSpec("random_blocks", torch.bool, "bhqk", "bhsd")),
    "fp32_mask": dataclasses.replace(PLAIN, mask=MaskSpec("random", torch.float32, "qk", "bhsd"), causal=True),
    "window": dataclasses.replace(PLAIN, window=(100, 5), bottom_right=True),
    "bottom_right": dataclasses.replace(PLAIN, causal=True, bottom_right=True),
    "no_keys": dataclasses.replace(PLAIN, seqlen_k=0),
}


def quantized(problem: feature_run.Problem, precision: str, masked: bool | None = None) -> Any:
    case = problem.case
    masked = not case.plain if masked is None else masked
    return sagert.quantize_kv(problem.k, problem.v, precision=precision, smooth_k=case.smooth_k, masked=masked)


def attend(problem: feature_run.Problem, kv: Any, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`sagert.attention` of a problem's queries over `kv`, with LSE."""
    given = feature_run.options_of(problem)
    given.pop("smooth_k", None)
    out, lse = sagert.attention(problem.q, kv, **given, precision=precision, return_lse=True)
    return out, lse


def served(case: FeatureCase, here: list[Any], info: Any) -> list[Any]:
    """The rows that selection takes for a case and that read keys and values quantized before."""
    plans = feature_run.plans(case, here, info)
    return [row for row, chosen in plans if chosen and "quantized_kv" in row.flags]


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_one_call(name: str, here: list[Any], info: Any, device: torch.device) -> None:
    case = CASES[name]
    for row in served(case, here, info):
        problem = feature_run.build(case, device)
        want, want_lse = feature_run.public(problem, row.precision)
        kv = quantized(problem, row.precision)
        # The originals are overwritten, then freed, and their memory is given to something else.
        taken = [(problem.wholes[name].fill_(NAN).numel(), case.dtype) for name in "kv"]
        del problem.k, problem.v, problem.wholes["k"], problem.wholes["v"]
        dirt = [torch.full((size,), NAN, dtype=dtype, device=device) for size, dtype in taken * 2]
        for _ in range(2):  # the second time from the same buffer
            out, lse = attend(problem, kv, row.precision)
            assert torch.equal(out, want), f"{row.id}: other bits"
            assert want_lse is not None
            assert torch.equal(lse, want_lse), f"{row.id}: other LSE bits"
        assert len(dirt) == 4  # kept until here


def test_every_row_that_can_is_tested(here: list[Any], info: Any) -> None:
    taken = {row.id for case in generated(280, Limits.of(here)) for row in served(case, here, info)}
    assert taken, "no row of this device reads keys and values quantized before"
    assert taken <= {row.id for case in CASES.values() for row in served(case, here, info)}


def test_one_buffer_for_masks_windows_and_lengths(here: list[Any], info: Any, device: torch.device) -> None:
    """Quantized with masked=True, one buffer serves plain, masked and windowed calls of any number of queries."""
    for precision in dict.fromkeys(row.precision for row in here if {"mask", "quantized_kv"} <= set(row.flags)):
        kv = None
        for name in ("plain", "one_query", "window", "bottom_right", "bool_mask"):
            case = CASES[name]
            problem = feature_run.build(case, device)
            if kv is None:
                first = problem
                kv = quantized(problem, precision, masked=True)
            problem.k, problem.v = first.k, first.v
            want, want_lse = feature_run.expected(problem)
            out, lse = attend(problem, kv, precision)
            point = feature_run.measured(case, feature_run.Run(out, lse, {}), want, want_lse)
            row = next(row for row in here if row.precision == precision and "mask" in row.flags)
            assert not feature_run.verdict(point, row), f"{precision}, {name}"


def test_another_stream(here: list[Any], info: Any, device: torch.device) -> None:
    big = torch.randn(4096, 4096, device=device)
    for row in served(CASES["plain"], here, info):
        problem = feature_run.build(CASES["plain"], device)
        want, _ = feature_run.public(problem, row.precision)
        filling, reading = torch.cuda.Stream(device), torch.cuda.Stream(device)
        filling.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(filling):
            for _ in range(8):
                big @ big
            kv = quantized(problem, row.precision)
        reading.wait_stream(filling)
        with torch.cuda.stream(reading):
            out, _ = attend(problem, kv, row.precision)
        torch.cuda.synchronize()
        assert torch.equal(out, want), row.id


def test_graph(here: list[Any], info: Any, device: torch.device) -> None:
    """Quantizing and attending are both captured, and replayed with new inputs."""
    for row in served(CASES["causal"], here, info):
        problem = feature_run.build(CASES["causal"], device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = attend(problem, quantized(problem, row.precision), row.precision)
        for seed in (1, 2):
            other = feature_run.build(CASES["causal"], device, seed)
            for name in "qkv":
                getattr(problem, name).copy_(getattr(other, name))
            graph.replay()
            want, want_lse = feature_run.public(problem, row.precision)
            assert want_lse is not None
            assert torch.equal(out, want), f"{row.id}: replay {seed} differs from eager"
            assert torch.equal(lse, want_lse), f"{row.id}: LSE of replay {seed} differs from eager"


def test_nonfinite_values_are_kept(here: list[Any], info: Any, device: torch.device) -> None:
    """NaN and Inf of V survive in the quantized form: a masked query that does not see them stays finite."""
    case = dataclasses.replace(PLAIN, mask=MaskSpec("random", torch.bool, "bhqk", "bhsd"))
    for row in served(case, here, info):
        problem = feature_run.build(case, device)
        problem.v[:, 0, 70, 5] = float("inf")
        problem.v[:, 1, 300, 9] = float("nan")
        problem.v[:, 1, 301, 10] = -float("inf")
        want, _ = feature_run.expected(problem)
        out, _ = attend(problem, quantized(problem, row.precision), row.precision)
        assert torch.equal(torch.isnan(out), torch.isnan(want)), row.id
        assert torch.equal(torch.isposinf(out), torch.isposinf(want)), row.id
        assert torch.equal(torch.isneginf(out), torch.isneginf(want)), row.id
