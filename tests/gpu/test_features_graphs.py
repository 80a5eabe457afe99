# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of every row and feature: a replay with new inputs gives the bits of an eager call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import feature_run
import pytest
import torch
from feature_cases import FeatureCase, Limits, generated
from feature_masks import MaskSpec

import sagert

REPLAYS = 3


def case_of(index: int, **features: Any) -> FeatureCase:
    sizes: dict[str, Any] = {"batch": 2, "seqlen_q": 257, "seqlen_k": 257, "head_dim": 64, "head_dim_v": 64}
    if "segments" in features:
        queries, keys = ([pair[i] for pair in features["segments"]] for i in (0, 1))
        sizes |= {"batch": len(queries), "seqlen_q": max(queries), "seqlen_k": max(keys)}
    memory = ("bshd", "bhsd", "bshd", "bshd")
    values = {"index": index, "heads_kv": 2, "group": 2, "dtype": torch.bfloat16, "memory": memory}
    return FeatureCase(**{**values, **sizes, **features})


CASES = {
    "plain": case_of(0),
    "causal": case_of(1, causal=True, head_dim=128, head_dim_v=128),
    "split": case_of(2, batch=1, heads_kv=1, group=1, seqlen_q=32, seqlen_k=4096),
    "wide": case_of(3, head_dim=200, head_dim_v=200, dtype=torch.float16),
    "narrow_v": case_of(4, head_dim=96, head_dim_v=40),
    "bool_mask": case_of(5, mask=MaskSpec("random_blocks", torch.bool, "bhqk", "bhsd")),
    "fp32_mask": case_of(6, mask=MaskSpec("random", torch.float32, "qk", "bhsd"), causal=True),
    "window": case_of(7, window=(50, 3), bottom_right=True, seqlen_k=300),
    "varlen": case_of(8, segments=((100, 120), (0, 60), (257, 257))),
    "varlen_causal": case_of(9, segments=((80, 33), (70, 0), (1, 129)), causal=True, bottom_right=True),
}
OTHER_LENGTHS = {"varlen": ((200, 77), (57, 257), (100, 103)), "varlen_causal": ((1, 62), (70, 50), (80, 50))}


def refill(problem: feature_run.Problem, seed: int, name: str) -> None:
    """New inputs, mask and (where the totals allow it) cumulative lengths, in the same memory."""
    other = feature_run.build(problem.case, problem.q.device, seed)
    for target, source in ((problem.q, other.q), (problem.k, other.k), (problem.v, other.v)):
        target.copy_(source)
    if problem.mask is not None and other.mask is not None:
        problem.mask.copy_(other.mask)
    if problem.packed is not None and name in OTHER_LENGTHS:
        lengths = OTHER_LENGTHS[name] if seed % 2 else problem.case.segments or ()
        for i, target in enumerate((problem.packed.cu_seqlens_q, problem.packed.cu_seqlens_k)):
            target.copy_(feature_run.cumulative([pair[i] for pair in lengths], target.device))


def test_the_other_lengths_fit() -> None:
    for name, lengths in OTHER_LENGTHS.items():
        was = CASES[name].segments or ()
        for i in (0, 1):
            assert sum(pair[i] for pair in lengths) == sum(pair[i] for pair in was)
            assert max(pair[i] for pair in lengths) <= max(pair[i] for pair in was)


@pytest.mark.parametrize("name", CASES)
def test_replay_equals_eager(name: str, here: list[Any], info: Any, device: torch.device) -> None:
    case = CASES[name]
    for row, chosen in feature_run.plans(case, here, info):
        if not chosen:
            continue
        problem = feature_run.build(case, device)
        out, _ = problem.output()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = feature_run.public(problem, row.precision, out)
        for seed in range(1, REPLAYS + 1):
            refill(problem, seed, name)
            out.fill_(float("nan"))
            graph.replay()
            want, want_lse = feature_run.public(problem, row.precision)
            assert torch.equal(out, want), f"{row.id}: replay {seed} differs from eager"
            assert lse is not None
            assert want_lse is not None
            assert torch.equal(lse, want_lse), f"{row.id}: LSE of replay {seed} differs from eager"


def test_every_row_is_replayed(here: list[Any], info: Any) -> None:
    """Every row that selection takes for any of the generated cases is one that a case here takes."""
    replayed, taken = (
        {row.id for case in cases for row, chosen in feature_run.plans(case, here, info) if chosen}
        for cases in (CASES.values(), generated(280, Limits.of(here)))
    )
    assert taken <= replayed


def compilable(problem: feature_run.Problem) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A function of tensors alone that calls the public function for a problem, and those tensors."""
    given = feature_run.options_of(problem)
    tensors = [problem.q, problem.k, problem.v]
    if problem.packed is not None:
        longest = (problem.packed.max_seqlen_q, problem.packed.max_seqlen_k)

        def packed(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor
        ) -> torch.Tensor:
            return sagert.attention_varlen(q, k, v, cu_q, cu_k, *longest, **given)

        return packed, [*tensors, problem.packed.cu_seqlens_q, problem.packed.cu_seqlens_k]
    mask = given.pop("attn_mask", None)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        return sagert.attention(q, k, v, *masks, **given)

    return plain, tensors if mask is None else [*tensors, mask]


@pytest.mark.parametrize("name", ["plain", "causal", "bool_mask", "fp32_mask", "window", "varlen"])
def test_compiled_with_graphs(name: str, here: list[Any], info: Any, device: torch.device) -> None:
    """torch.compile with CUDA graphs: mode "reduce-overhead" where a C compiler is there for it, else the backend."""
    case = CASES[name]
    if not any(chosen for _, chosen in feature_run.plans(case, here, info)):
        pytest.skip("no row of this device serves it")
    problem = feature_run.build(case, device)
    call, arguments = compilable(problem)
    compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    torch.compiler.reset()
    way = {"mode": "reduce-overhead"} if compiler else {"backend": "cudagraphs"}
    compiled = torch.compile(call, fullgraph=True, **way)
    for seed in range(4):
        refill(problem, seed, "")
        want = call(*arguments)
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(*arguments).clone()
        assert torch.equal(got, want), f"call {seed} differs from eager"
