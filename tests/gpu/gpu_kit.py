# SPDX-License-Identifier: Apache-2.0
"""Shapes, memory layouts, the exact oracle and the error measures of the GPU tests."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

LENGTHS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 255, 257, 384, 1000, 1023, 4097)
GROUPS = (1, 4, 8)
MEMORY = ("bhsd", "bshd", "sliced", "fused_qkv", "strided_last", "offset", "permuted")
CASES = 672
SENTINEL = 12345.0


@dataclass(frozen=True)
class Case:
    """One attention problem: sizes, masking, dtype and how Q, K, V and the output lie in memory."""

    index: int
    batch: int
    heads_kv: int
    group: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    dtype: torch.dtype
    memory: str

    @property
    def heads(self) -> int:
        return self.heads_kv * self.group

    @property
    def outputs(self) -> int:
        return self.batch * self.heads * self.seqlen_q * self.head_dim

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}-{self.memory}{'-causal' if self.causal else ''}"
        heads = f"h{self.heads}" if self.group == 1 else f"h{self.heads}kv{self.heads_kv}"
        return f"{self.index}-b{self.batch}{heads}-q{self.seqlen_q}k{self.seqlen_k}-d{self.head_dim}-{kind}"


def cases(count: int = CASES, seed: int = 20) -> list[Case]:
    """`count` cases in which every length, head dim 1 to 128, group, layout, mask and dtype occurs; always the same."""
    rng = random.Random(seed)
    made: list[Case] = []
    for index in range(count):
        seqlen_q = LENGTHS[index % len(LENGTHS)]
        seqlen_k = seqlen_q if rng.random() < 0.3 else rng.choice(LENGTHS)
        long = max(seqlen_q, seqlen_k) >= 1000
        turn = index // 4 * 3 + index % 4 - 1  # counts the indices that 4 does not divide
        head_dim = 1 + turn * 37 % 128 if index % 4 else rng.choice((32, 64, 80, 96, 128))
        memory = MEMORY[index % len(MEMORY)]
        made.append(
            Case(
                index=index,
                batch=1 if long else rng.choice((1, 2, 3)),
                heads_kv=1 if long else rng.choice((1, 2)),
                group=rng.choice(GROUPS[:2] if long else GROUPS),
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_q if memory == "fused_qkv" else seqlen_k,
                head_dim=head_dim,
                causal=rng.random() < 0.5,
                dtype=rng.choice((torch.float16, torch.bfloat16)),
                memory=memory,
            )
        )
    return made


def place(values: torch.Tensor, memory: str, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays `values` ``[B, H, S, D]`` out as `memory` says.

    Returns:
        The view that holds the values, and the whole buffer it lies in, `fill` everywhere else.
    """
    b, h, s, d = values.shape

    def buffer(*size: int) -> torch.Tensor:
        return torch.full(size, fill, dtype=values.dtype, device=values.device)

    if memory == "bhsd":
        whole = buffer(b, h, s, d)
        view = whole
    elif memory == "bshd":
        whole = buffer(b, s, h, d)
        view = whole.transpose(1, 2)
    elif memory == "sliced":
        whole = buffer(b, h + 1, s + 3, d + 8)
        view = whole[:, 1:, 2 : 2 + s, 8:]
    elif memory == "strided_last":
        whole = buffer(b, h, s, 2 * d)
        view = whole[..., ::2]
    elif memory == "offset":  # not even 4-byte aligned
        whole = buffer(b * h * s * d + 1)
        view = whole[1:].view(b, h, s, d)
    elif memory == "permuted":  # the head dim outermost
        whole = buffer(d, s, b, h)
        view = whole.permute(2, 3, 1, 0)
    elif memory == "fused_qkv":  # [B, S, 3, H, D], as a fused projection leaves it
        whole = buffer(b, s, 3, h, d)
        view = whole[:, :, 1].transpose(1, 2)
    else:
        raise ValueError(f"memory={memory!r}; accepted: {', '.join(MEMORY)}")
    view.copy_(values)
    return view, whole


def randn(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V from N(0, 1), the same on every run."""
    generator = torch.Generator(device=device).manual_seed(1000 + case.index)

    def draw(heads: int, length: int) -> torch.Tensor:
        size = (case.batch, heads, length, case.head_dim)
        return torch.randn(size, generator=generator, device=device).to(case.dtype)

    if case.memory == "fused_qkv" and case.group == 1:
        fused = torch.empty(case.batch, case.seqlen_q, 3, case.heads, case.head_dim, dtype=case.dtype, device=device)
        fused.copy_(torch.randn(fused.shape, generator=generator, device=device))
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        return q, k, v
    q = place(draw(case.heads, case.seqlen_q), case.memory, float("nan"))[0]
    k = place(draw(case.heads_kv, case.seqlen_k), case.memory, float("nan"))[0]
    v = place(draw(case.heads_kv, case.seqlen_k), case.memory, float("nan"))[0]
    return q, k, v


def visible(seqlen_q: int, seqlen_k: int, causal: bool, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, bool ``[S, Sk]``; causal is top-left aligned."""
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return seen.tril() if causal else seen


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 of ``[B, H, S, D]`` inputs, NaN and Inf of V reaching exactly the queries that see them.

    Returns:
        Output ``[B, H, S, D]`` and LSE ``[B, H, S]``, both float64.
    """
    group = q.shape[1] // k.shape[1]
    q = q.double()
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    seen = visible(q.shape[2], k.shape[2], causal, q.device)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if k.shape[2] else torch.full_like(scores.sum(-1), float("-inf"))
    # An unseen key has weight 0, and 0 times NaN must stay 0: finite values first, then what the seen ones add.
    out = torch.softmax(scores, dim=-1) @ torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0)
    if not torch.isfinite(v).all():
        seen64 = seen.double()
        for mark in (float("inf"), float("-inf"), float("nan")):
            hit = torch.isnan(v) if mark != mark else v == mark
            out = out + torch.where(seen64 @ hit.double() > 0, mark, 0.0)
    return out, lse


def relative_l1(got: torch.Tensor, want: torch.Tensor) -> float:
    """Sum of absolute errors over the sum of absolute values, in float64."""
    return float((got.double() - want.double()).abs().sum() / want.double().abs().sum().clamp_min(1e-30))


def cosine(got: torch.Tensor, want: torch.Tensor) -> float:
    """Cosine similarity of the two tensors as vectors, in float64."""
    got, want = got.double().flatten(), want.double().flatten()
    return float(got @ want / (got.norm() * want.norm()).clamp_min(1e-30))
