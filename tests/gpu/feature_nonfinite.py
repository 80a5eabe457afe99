# SPDX-License-Identifier: Apache-2.0
"""Where NaN and Inf are put into feature cases, and what is wrong with where they come out."""

from __future__ import annotations

from typing import Any

import feature_run
import torch
from feature_cases import FeatureCase
from feature_masks import MaskSpec

NAN, INF = float("nan"), float("inf")
LENGTH = 400
DENSE = ("bhsd",) * 4


def case_of(head_dim: int = 64, **features: Any) -> FeatureCase:
    sizes: dict[str, Any] = {"batch": 1, "seqlen_q": LENGTH, "seqlen_k": LENGTH}
    if "segments" in features:
        queries, keys = ([pair[i] for pair in features["segments"]] for i in (0, 1))
        sizes = {"batch": len(queries), "seqlen_q": max(queries), "seqlen_k": max(keys)}
    values = {"index": 5, "heads_kv": 2, "group": 2, "head_dim": head_dim, "head_dim_v": head_dim, "memory": DENSE}
    return FeatureCase(**{**values, **sizes, "dtype": torch.float16, **features})


def mask(pattern: str, dtype: torch.dtype = torch.bool, shape: str = "bhqk") -> MaskSpec:
    return MaskSpec(pattern, dtype, shape, "bhsd", "zero")


CASES = {
    "bool": case_of(mask=mask("random")),
    "bool_bf16": case_of(mask=mask("random", shape="qk"), dtype=torch.bfloat16),
    "fp32_causal": case_of(mask=mask("dense", torch.float32), causal=True),
    "fp16_blocks": case_of(mask=mask("random_blocks", torch.float16)),
    "banded": case_of(mask=mask("banded", shape="qk")),
    "padding": case_of(mask=mask("padding", shape="b11k"), batch=2),
    "empty_rows": case_of(mask=mask("empty_rows"), head_dim=128),
    "window": case_of(window=(90, 20)),
    "window_bottom_right": case_of(window=(100, 0), bottom_right=True, seqlen_q=150),
    "bottom_right": case_of(causal=True, bottom_right=True, seqlen_k=300),
    "bottom_right_long_q": case_of(causal=True, bottom_right=True, seqlen_q=300, head_dim=100),
    "varlen": case_of(segments=((100, 120), (0, 50), (200, 230), (70, 0))),
    "varlen_causal": case_of(segments=((100, 120), (300, 280)), causal=True, dtype=torch.bfloat16),
    "varlen_window": case_of(segments=((100, 220), (200, 180)), window=(40, 8), bottom_right=True),
    "wide": case_of(head_dim=192, mask=mask("random", torch.bfloat16)),
    "wide_plain": case_of(head_dim=256, causal=True),
    "narrow_v": case_of(head_dim=96, head_dim_v=64, window=(200, 200)),
}
# Tensor, places (key head or head, token, channel), value. Tokens lie where every case has other keys beside them.
PLACES: list[tuple[str, list[tuple[int, int, int]], float]] = [
    ("q", [(1, 40, 3)], NAN),
    ("q", [(1, 40, 3)], INF),
    ("k", [(0, 70, 5)], NAN),
    ("k", [(0, 70, 5)], INF),
    ("k", [(1, 70, 5), (1, 95, 5)], -INF),
    ("v", [(0, 70, 5)], NAN),
    ("v", [(0, 70, 5)], INF),
    ("v", [(0, 70, 5), (1, 0, 0)], -INF),
    ("v", [(0, 3, 7), (0, 90, 7), (1, 141, 33)], INF),
    ("v", [(0, 60, 9)], -INF),
    ("v", [(1, 99, 1), (1, 30, 1)], NAN),
]


def spoil(problem: feature_run.Problem, name: str, where: list[tuple[int, int, int]], value: float) -> bool:
    """Puts `value` at (head, token, channel) `where` of every batch entry; False where no token is that far along."""
    tensor = {"q": problem.q, "k": problem.k, "v": problem.v}[name]
    by_token = tensor if problem.packed is not None else tensor.transpose(1, 2)  # [.., S, H, D]
    if name == "k":
        # A query value that INT8 rounds to 0 meets Inf as 0 times Inf, which is NaN (docs/numerics.md): keep clear.
        channel = problem.q[..., where[0][2]]
        channel.copy_(torch.where(channel < 0, channel.clamp(max=-0.25), channel.clamp(min=0.25)))
    used = [place for place in where if place[1] < by_token.shape[-3]]
    for head, token, channel_index in used:
        by_token[..., token, head, channel_index] = value
    return bool(used)


def pattern_failures(
    out: torch.Tensor, lse: torch.Tensor | None, want: torch.Tensor, want_lse: torch.Tensor, tolerance: float
) -> list[str]:
    """Where NaN and Inf of an output and its LSE differ from the exact ones, or the finite rest is too far off."""
    finite = torch.isfinite(want)
    error = (out.double() - want).abs()[finite].sum() / want.abs()[finite].sum().clamp_min(1e-30)
    checks = {
        "NaN elsewhere than in exact attention": torch.equal(torch.isnan(out), torch.isnan(want)),
        "+Inf elsewhere than in exact attention": torch.equal(torch.isposinf(out), torch.isposinf(want)),
        "-Inf elsewhere than in exact attention": torch.equal(torch.isneginf(out), torch.isneginf(want)),
        f"relative L1 of the finite rest {float(error):.4f}": float(error) <= 1.5 * tolerance,
    }
    if lse is not None:
        checks["NaN in the LSE elsewhere"] = torch.equal(torch.isnan(lse), torch.isnan(want_lse))
        checks["Inf in the LSE elsewhere"] = torch.equal(torch.isinf(lse), torch.isinf(want_lse))
    return [text for text, good in checks.items() if not good]


def placement_failures(
    case: FeatureCase, here: list[Any], info: Any, device: torch.device, places: slice = slice(None)
) -> tuple[list[str], int]:
    """What is wrong with any row's results at those of PLACES, and how many runs there were."""
    failures, runs = [], 0
    for turn, (tensor, where, value) in list(enumerate(PLACES))[places]:
        problem = feature_run.build(case, device, seed=turn)
        if not spoil(problem, tensor, where, value):
            continue
        want = feature_run.expected(problem)
        for row, chosen in feature_run.plans(case, here, info):
            run = feature_run.guarded(problem, row.precision, None if chosen else row.id)
            # An Inf in Q or K is a score of Inf: whether that LSE is Inf or NaN is the kernel's order of operations.
            lse = None if tensor in "qk" and abs(value) == INF else run.lse
            wrong = pattern_failures(run.out, lse, *want, row.relative_l1)
            wrong += [text for text, good in run.checks.items() if not bool(good)]
            failures += [f"{row.id}, {tensor} {value} at {where}: {text}" for text in wrong]
            runs += 1
    return failures, runs
