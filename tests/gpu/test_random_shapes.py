# SPDX-License-Identifier: Apache-2.0
"""Every precision of this device over 1,000 problems drawn at random from a fixed seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gpu_kit import MEMORY, Case, check_errors, errors, exact, poisoned_attention, randn

SEED = 21
PROBLEMS = 1000
CHUNK = 50
LENGTH_MAX = 4096
BLOCKS = (64, 128, 192)  # lengths close to multiples of these are where tiles begin and end
SCORES_MAX = 1 << 24  # per problem, so that the exact result stays cheap
GROUPS = (1, 2, 3, 4, 8)
DTYPES = (torch.float16, torch.bfloat16)


def draw_length(rng: random.Random) -> int:
    """1 to LENGTH_MAX, uniform in the logarithm; in three of five draws moved next to a multiple of a block."""
    length = round(LENGTH_MAX ** rng.random())
    if rng.random() < 0.6:
        block = rng.choice(BLOCKS)
        length = max(block, round(length / block) * block) + rng.choice((-1, 0, 1))
    return min(max(length, 1), LENGTH_MAX)


def draw_head_dim(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice((64, 128))
    return rng.randrange(1, 129, 2) if kind < 0.75 else rng.randint(1, 128)


def draw_case(index: int, rng: random.Random) -> Case:
    seqlen_q = draw_length(rng)
    memory = rng.choice(MEMORY)
    seqlen_k = seqlen_q if memory == "fused_qkv" or rng.random() < 0.3 else draw_length(rng)
    batch, heads_kv, group = rng.randint(1, 3), rng.randint(1, 4), rng.choice(GROUPS)
    scores = seqlen_q * seqlen_k
    batch = max(1, min(batch, SCORES_MAX // scores))
    heads_kv = max(1, min(heads_kv, SCORES_MAX // (scores * batch)))
    group = max(g for g in GROUPS if g == 1 or (g <= group and g * heads_kv * batch * scores <= SCORES_MAX))
    return Case(
        index=index,
        batch=batch,
        heads_kv=heads_kv,
        group=group,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=draw_head_dim(rng),
        causal=rng.random() < 0.5,
        dtype=rng.choice(DTYPES),
        memory=memory,
    )


def draw_chunk(first: int) -> list[Case]:
    """Problems `first` to `first` + CHUNK - 1. Each has a seed of its own, so that one alone is the same problem."""
    return [draw_case(index, random.Random(SEED * PROBLEMS + index)) for index in range(first, first + CHUNK)]


@pytest.mark.parametrize("first", range(0, PROBLEMS, CHUNK), ids=lambda first: f"{first}-{first + CHUNK - 1}")
def test_random_problems(
    first: int, served: list[str], tolerance: dict[str, float], device: torch.device, record: Any
) -> None:
    failures = []
    for case in draw_chunk(first):
        q, k, v = randn(case, device)
        want, want_lse = exact(q, k, v, case.causal)
        for precision in served:
            try:
                out, lse = poisoned_attention(case, q, k, v, precision)
                point = errors(case, out, lse, want, want_lse)
                record.add("random_shapes", precision, **point)
                check_errors(point, precision, tolerance[precision])
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, "\n".join(failures)
