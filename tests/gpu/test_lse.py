# SPDX-License-Identifier: Apache-2.0
"""The LSE against float64: of the scores that the row quantizes, where only the kernel's own arithmetic is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import feature_run
import pytest
import torch
from feature_cases import FeatureCase
from feature_masks import MaskSpec
from feature_oracle import positions_see
from gpu_kit import arithmetic

from sagert import quantize, recipes

LENGTH = 4096
LSE_MAX = 1e-3
# More where the LSE is of weights that are bytes: in a row of which one key has most of the weight, a byte that rounds
# the other way is 1 in 255.
LSE_MAX_BYTES = LSE_MAX + 1 / 255

PLAIN = FeatureCase(
    index=1, batch=1, heads_kv=2, group=2, seqlen_q=LENGTH, seqlen_k=LENGTH, head_dim=128, head_dim_v=128,
    dtype=torch.bfloat16, memory=("bhsd",) * 4,
)  # fmt: skip
CASES = {
    "plain": PLAIN,
    "fp16": dataclasses.replace(PLAIN, dtype=torch.float16, head_dim=64, head_dim_v=64),
    "causal": dataclasses.replace(PLAIN, causal=True),
    "window": dataclasses.replace(PLAIN, window=(1000, 50), head_dim=72, head_dim_v=72),
    "bool_mask": dataclasses.replace(PLAIN, mask=MaskSpec("random", torch.bool, "bhqk", "bhsd")),
    "fp32_mask": dataclasses.replace(PLAIN, mask=MaskSpec("dense", torch.float32, "qk", "bhsd", "normal")),
    "wide": dataclasses.replace(PLAIN, head_dim=256, head_dim_v=256),
}


def sums_bytes(recipe: recipes.Recipe) -> bool:
    """Whether a row's LSE is of its weights as bytes, each block's largest being 255."""
    return recipe.family == "mma" and recipe.pv == "int8"


def lse_of_bytes(scores: torch.Tensor, block: int) -> torch.Tensor:
    """LSE ``[S]`` of weights that are rounded to bytes, in blocks of keys of `scores` ``[S, Sk]``."""
    scores = torch.nn.functional.pad(scores, (0, -scores.shape[1] % block), value=-float("inf"))
    blocks = scores.unflatten(1, (-1, block))
    highest = blocks.amax(2, keepdim=True).clamp_min(-1e30)
    weights = (255.0 * (blocks - highest).exp()).round()
    return torch.logsumexp(highest[..., 0] + (weights.sum(2) / 255.0).log(), 1)


def quantized_scores_lse(problem: feature_run.Problem, recipe: recipes.Recipe) -> torch.Tensor:
    """Float64 LSE ``[B, H, S]`` of the scores after a recipe's quantization of Q and K, the shift of K given back."""
    case, q, k = problem.case, problem.q, problem.k
    lse = torch.empty(q.shape[:3], dtype=torch.float64, device=q.device)
    rows = torch.arange(case.seqlen_q, device=q.device)
    seen = positions_see(rows, case.seqlen_q, case.seqlen_k, case.causal, case.bottom_right, case.window)
    for batch in range(case.batch):
        kv = recipes.quantize_heads(k[batch], problem.v[batch], recipe)
        queries = recipes.quantize_queries(q[batch], case.head_dim**-0.5, recipe, case.seqlen_q)
        for head in range(case.heads):
            mine = head // case.group
            scores = queries.values[head].double() @ kv.k[mine].double().T * kv.k_scale[mine].double().T
            scores = scores * queries.scale[head].double()
            if queries.mean is not None:
                scores += queries.mean[head].double() @ (k[batch, mine].double() - kv.k_shift[mine].double()).T
            scores = scores / recipes.LOG2E
            visible = seen
            if problem.mask is not None:
                part = problem.mask.expand(case.sizes)[batch, head]
                if part.dtype == torch.bool:
                    visible = seen & part
                else:
                    visible, scores = seen & (part != -float("inf")), scores + part.double().clamp_min(-1e30)
            scores = scores.masked_fill(~visible, -float("inf"))
            given_back = (q[batch, head].double() * case.head_dim**-0.5) @ kv.k_shift[mine, 0].double()
            summed = lse_of_bytes(scores, recipe.block_n) if sums_bytes(recipe) else torch.logsumexp(scores, -1)
            lse[batch, head] = summed + given_back
    return lse


def rounds_alike(q: torch.Tensor, recipe: recipes.Recipe) -> torch.Tensor:
    """Queries ``[B, H, S]`` without a channel in the middle of two integers, where a last bit of the scale decides."""
    x = q.double()
    if recipe.qk == "int4":
        x = x - quantize.q_means(q).double()
    x = x.abs()
    x = x * recipes.CODES[recipe.qk] / x.amax(-1, keepdim=True)
    return ((x.frac() - 0.5).abs() > 1e-4).all(-1)


@pytest.mark.parametrize("name", CASES)
def test_lse_of_the_quantized_scores(name: str, here: list[Any], info: Any, device: torch.device) -> None:
    problem = feature_run.build(CASES[name], device)
    wanted: dict[recipes.Recipe, tuple[torch.Tensor, torch.Tensor]] = {}
    for row, chosen in feature_run.plans(CASES[name], here, info):
        options = arithmetic(row, CASES[name].head_dim)
        recipe = recipes.recipe_of(row.precision, CASES[name].smooth_k, **options)
        if not sums_bytes(recipe):  # how P V is computed does not matter then
            recipe = recipes.recipe_of(f"{recipe.qk}_fp16", recipe.smooth_k, row.family)
        if recipe not in wanted:
            wanted[recipe] = quantized_scores_lse(problem, recipe), rounds_alike(problem.q, recipe)
        want, sure = wanted[recipe]
        assert sure.float().mean() > 0.5
        got = feature_run.guarded(problem, row.precision, None if chosen else row.id).lse
        assert got is not None
        error = float((got.double() - want).abs()[sure].max())
        assert error <= (LSE_MAX_BYTES if sums_bytes(recipe) else LSE_MAX), f"{row.id}: LSE off by {error:.2e}"
