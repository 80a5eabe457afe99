# SPDX-License-Identifier: Apache-2.0
"""Shapes, memory layouts, the exact oracle, poisoned outputs and the error measures of the GPU tests."""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import dataclass
from typing import Any

import torch

import sagert

LENGTHS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 255, 257, 384, 1000, 1023, 4097)
GROUPS = (1, 4, 8)
MEMORY = ("bhsd", "bshd", "sliced", "fused_qkv", "strided_last", "offset", "permuted")
CASES = 672
SENTINEL = 12345.0
# Of an LSE on N(0, 1) inputs, by the type of Q and K. One visible key's LSE is off by what rounding does to its score,
# whose deviation is hypot(3.0, 3.5) / codes / 12 ** 0.5: 3.0 is a query's largest value, 3.5 that of 16 keys, and there
# are 127 or 7 codes on either side of 0. That is 0.0105 and 0.19; out of millions some are five deviations off.
LSE_ERROR_MAX = {"int8": 0.1, "int4": 1.2}
# Values of Q below it round to 0. INT4 leaves them their sign beside infinities.
CLEAR_OF_ZERO = {"int8": 0.25, "int4": 0.0}


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


def place(values: torch.Tensor, memory: str, fill: float, margin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays `values` ``[B, H, S, D]`` out as `memory` says, `margin` elements away from either end of its buffer.

    Returns:
        The view that holds the values, and the whole buffer it lies in, flat, `fill` everywhere else.
    """
    b, h, s, d = values.shape
    whole = values.new_empty(0)

    def buffer(*size: int) -> torch.Tensor:
        nonlocal whole
        whole = torch.full((math.prod(size) + 2 * margin,), fill, dtype=values.dtype, device=values.device)
        return whole[margin : margin + math.prod(size)].view(size)

    if memory == "bhsd":
        view = buffer(b, h, s, d)
    elif memory == "bshd":
        view = buffer(b, s, h, d).transpose(1, 2)
    elif memory == "sliced":
        view = buffer(b, h + 1, s + 3, d + 8)[:, 1:, 2 : 2 + s, 8:]
    elif memory == "strided_last":
        view = buffer(b, h, s, 2 * d)[..., ::2]
    elif memory == "offset":  # not even 4-byte aligned
        view = buffer(b * h * s * d + 1)[1:].view(b, h, s, d)
    elif memory == "permuted":  # the head dim outermost
        view = buffer(d, s, b, h).permute(2, 3, 1, 0)
    elif memory == "fused_qkv":  # [B, S, 3, H, D], as a fused projection leaves it
        view = buffer(b, s, 3, h, d)[:, :, 1].transpose(1, 2)
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


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 of ``[B, H, S, D]`` inputs, NaN and Inf of V reaching exactly the queries that see them.

    Causal is aligned top left. `rows` int64 ``[R]`` chooses queries; without it all are computed.

    Returns:
        Output ``[B, H, R, D]`` and LSE ``[B, H, R]``, both float64.
    """
    group = q.shape[1] // k.shape[1]
    position = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    q = q[:, :, position].double()
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    seen = torch.ones(len(position), k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = torch.arange(k.shape[2], device=q.device) <= position[:, None]
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


def poisoned_attention(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """sagert's output and LSE of `case`, the output's memory filled beforehand and lying as the case says.

    AssertionError where an output is not finite or not written, anything outside it is written, or an input changes.
    """
    context = f"{precision}, {case}"
    before = [t.clone() for t in (q, k, v)]
    poison = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    out, whole = place(poison, case.memory, SENTINEL)
    result, lse = sagert.attention(
        q, k, v, is_causal=case.causal, enable_gqa=case.group > 1, precision=precision, return_lse=True, out=out
    )
    assert result.data_ptr() == out.data_ptr(), context
    assert torch.isfinite(out).all(), f"{context}: outputs left unwritten or not finite"
    assert int((whole == SENTINEL).sum()) >= whole.numel() - out.numel(), f"{context}: wrote outside the output"
    for name, was, now in zip("qkv", before, (q, k, v), strict=True):
        assert torch.equal(was, now), f"{context}: {name} was modified"
    assert lse.shape == q.shape[:3], context
    assert lse.dtype == torch.float32, context
    return out, lse


def lse_error_max(precision: str) -> float:
    """How far a precision's LSE may be from the exact one on N(0, 1) inputs."""
    return LSE_ERROR_MAX[precision.partition("_")[0]]


@functools.cache
def _rows() -> dict[str, Any]:
    return {row.id: row for row in sagert.kernels()}


def serving_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, precision: str) -> Any:
    """The row that serves plain attention of these tensors."""
    told = sagert.explain(q, k, v, is_causal=causal, precision=precision, return_lse=True).row
    assert told is not None
    return _rows()[told]


def sums_in_fp16(row: Any) -> bool:
    """Whether a row sums products of P and V in fp16 first: other arithmetic than its family's in fp32."""
    return "pv_sum" in row.quant


def block_of(row: Any, head_dim: int) -> int | None:
    """Keys of a block in which a row scales P, or that it takes at a time; None where it is the family's number."""
    if "p_step" in row.quant:
        return int(row.quant["p_step"].removesuffix(" keys"))
    found = re.match(r"row of a block of (\d+)(?: keys, of (\d+) above head_dim (\d+))?", str(row.quant.get("p_scale")))
    if found is None:
        return None
    return int(found[2] if found[3] and head_dim > int(found[3]) else found[1])


def arithmetic(row: Any, head_dim: int) -> dict[str, Any]:
    """Options of `sagert.reference.attention` that make it follow a row."""
    even_v = "a factor of the block" in row.quant.get("v_scale", "") and 96 < head_dim <= 128
    options = {"family": row.family, "half_sums": sums_in_fp16(row), "even_v": even_v}
    return options | {"block_n": block_of(row, head_dim)}


def relative_l1(got: torch.Tensor, want: torch.Tensor) -> float:
    """Sum of absolute errors over the sum of absolute values, in float64."""
    return float((got.double() - want.double()).abs().sum() / want.double().abs().sum().clamp_min(1e-30))


def cosine(got: torch.Tensor, want: torch.Tensor) -> float:
    """Cosine similarity of the two tensors as vectors, in float64."""
    got, want = got.double().flatten(), want.double().flatten()
    return float(got @ want / (got.norm() * want.norm()).clamp_min(1e-30))


def errors(
    case: object, out: torch.Tensor, lse: torch.Tensor, want: torch.Tensor, want_lse: torch.Tensor
) -> dict[str, Any]:
    """What is recorded of one output ``[B, H, S, D]`` and LSE ``[B, H, S]`` against the exact ones."""
    return {
        "case": str(case),
        "outputs": out.numel(),
        "relative_l1": relative_l1(out, want),
        "cosine": cosine(out, want),
        "lse_error": float((lse.double() - want_lse).abs().max()),
    }


def allowed(tolerance: float, outputs: int) -> float:
    """The row's tolerance holds for many outputs; the mean over few scatters more."""
    return tolerance * (1.3 if outputs >= 4096 else 1.3 + 60.0 / outputs**0.5)


def check_errors(point: dict[str, Any], precision: str, tolerance: float) -> None:
    """AssertionError where what `errors` found is beyond the row's tolerance."""
    context = f"{precision}, {point['case']}"
    error, lse_error = point["relative_l1"], point["lse_error"]
    assert error <= allowed(tolerance, point["outputs"]), f"{context}: relative L1 {error:.5f}"
    assert lse_error <= lse_error_max(precision), f"{context}: LSE off by {lse_error:.4f}"


def check_placement(
    length: int,
    name: str,
    where: list[tuple[int, ...]],
    value: float,
    dtype: torch.dtype,
    causal: bool,
    served: list[str],
    tolerance: dict[str, float],
    device: torch.device,
) -> None:
    """Puts `value` at indices `where` of Q, K or V of `length` tokens; AssertionError where NaN or Inf appear elsewhere
    than in exact attention, or the rest is beyond the row's tolerance."""
    generator = torch.Generator(device=device).manual_seed(7)
    tensors = {
        n: torch.randn(1, h, length, 64, generator=generator, device=device).to(dtype)
        for n, h in (("q", 4), ("k", 2), ("v", 2))
    }
    if name == "k":
        # A query value that becomes 0 meets Inf as 0 times Inf, which is NaN (docs/numerics.md): keep clear.
        clear = max(CLEAR_OF_ZERO[precision.partition("_")[0]] for precision in served)
        channel = tensors["q"][..., where[0][3]]
        channel.copy_(torch.where(channel < 0, channel.clamp(max=-clear), channel.clamp(min=clear)))
    for index in where:
        tensors[name][index] = value
    want, _ = exact(tensors["q"], tensors["k"], tensors["v"], causal)
    for precision in served:
        out = torch.full_like(tensors["q"], 0.5)
        sagert.attention(*tensors.values(), is_causal=causal, enable_gqa=True, precision=precision, out=out)
        assert torch.equal(torch.isnan(out), torch.isnan(want)), f"{precision}: NaN elsewhere than in exact attention"
        assert torch.equal(torch.isinf(out), torch.isinf(want)), f"{precision}: Inf elsewhere than in exact attention"
        infinite = torch.isinf(want)
        assert torch.equal(out[infinite].double(), want[infinite]), f"{precision}: sign of Inf"
        finite = torch.isfinite(want)
        assert relative_l1(out[finite], want[finite]) <= 1.5 * tolerance[precision], precision
