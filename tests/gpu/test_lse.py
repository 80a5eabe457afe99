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

from sagert import reference

LENGTH = 4096
LSE_MAX = 1e-3

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


def quantized_scores_lse(problem: feature_run.Problem, family: str) -> torch.Tensor:
    """Float64 LSE ``[B, H, S]`` of the scores after a family's quantization of Q and K, the shift of K given back."""
    case, q, k = problem.case, problem.q, problem.k
    recipe = reference.Recipe("int8_fp16", case.smooth_k, family)
    q8, q_scale = reference.quantize_queries(q, case.head_dim**-0.5, recipe)
    lse = torch.empty(q.shape[:3], dtype=torch.float64, device=q.device)
    rows = torch.arange(case.seqlen_q, device=q.device)
    seen = positions_see(rows, case.seqlen_q, case.seqlen_k, case.causal, case.bottom_right, case.window)
    for batch in range(case.batch):
        kv = reference.quantize_heads(k[batch], problem.v[batch], recipe)
        for head in range(case.heads):
            mine = head // case.group
            scores = q8[batch, head].double() @ kv.k[mine].double().T * kv.k_scale[mine].double().T
            scores = scores * q_scale[batch, head].double() / reference.LOG2E
            visible = seen
            if problem.mask is not None:
                part = problem.mask.expand(case.sizes)[batch, head]
                if part.dtype == torch.bool:
                    visible = seen & part
                else:
                    visible, scores = seen & (part != -float("inf")), scores + part.double().clamp_min(-1e30)
            scores = scores.masked_fill(~visible, -float("inf"))
            given_back = (q[batch, head].double() * case.head_dim**-0.5) @ kv.k_shift[mine, 0].double()
            lse[batch, head] = torch.logsumexp(scores, -1) + given_back
    return lse


def rounds_alike(q: torch.Tensor) -> torch.Tensor:
    """Queries ``[B, H, S]`` without a channel in the middle of two integers, where a last bit of the scale decides."""
    x = q.double().abs()
    x = x * 127.0 / x.amax(-1, keepdim=True)
    return ((x.frac() - 0.5).abs() > 1e-4).all(-1)


@pytest.mark.parametrize("name", CASES)
def test_lse_of_the_quantized_scores(name: str, here: list[Any], info: Any, device: torch.device) -> None:
    problem = feature_run.build(CASES[name], device)
    wanted: dict[str, torch.Tensor] = {}
    sure = rounds_alike(problem.q)
    assert sure.float().mean() > 0.5
    for row, chosen in feature_run.plans(CASES[name], here, info):
        want = wanted.setdefault(row.family, quantized_scores_lse(problem, row.family))
        got = feature_run.guarded(problem, row.precision, None if chosen else row.id).lse
        assert got is not None
        error = float((got.double() - want).abs()[sure].max())
        assert error <= LSE_MAX, f"{row.id}: LSE off by {error:.2e}"
