# SPDX-License-Identifier: Apache-2.0
"""Attention problems for emulated rows, and what their results must be; runs in a worker."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from sagert import recipes, reference
from tests.emulator import call
from tests.gpu import gpu_kit

# How far the kernels may be from the reference, which adds in another order and has other last bits of exp2.
# Relative L1, and LSE. An integer of Q or K that rounds the other way moves a score by 127 / 7 times as much in INT4.
NEAR = {
    "int8_fp16": 0.0015, "int8_int8": 0.004, "int8_fp8": 0.02, "int4_fp16": 0.003, "int4_int8": 0.004,
    "int4_fp8": 0.02,
}  # fmt: skip
NEAR_LSE = {"int8": 0.01, "int4": 0.18}
ACCURACY = {  # rel_l1_randn of the rows
    "int8_fp16": 0.0114, "int8_int8": 0.0158, "int8_fp8": 0.039, "int4_fp16": 0.2, "int4_int8": 0.2,
    "int4_fp8": 0.2,
}  # fmt: skip
NEAR_JOINT = 0.045  # of int8_fp8, where warpgroups share a tile's keys: each rounds P beside a maximum of its own
LATE_KEYS = 128
SINK = 0.8  # added to every channel of Q and of the first keys: of head_dim 128, 7 more logits
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

PLACES = {  # of a value that is not finite, in heads of 140 keys and 64 channels
    "q": [[(0, 1, 3, 5)], [(0, 0, 64, 0), (0, 1, 129, 63)]],
    "k": [[(0, 0, 0, 3)], [(0, 0, 70, 9)], [(0, 0, 139, 63)]],
    "v": [[(0, 0, 0, 3)], [(0, 0, 70, 9), (0, 0, 90, 9)], [(0, 0, 139, 63)]],
}


@dataclass(frozen=True)
class Case:
    """One problem. `memory` as in tests/gpu/gpu_kit.py."""

    precision: str
    seqlen_q: int
    seqlen_k: int
    head_dim: int = 128
    dtype: str = "fp16"
    causal: bool = False
    batch: int = 1
    heads_kv: int = 1
    group: int = 2
    memory: str = "bhsd"
    factor: float = 1.0  # of Q and K
    rise: float = 1.0  # of the first key, beside the last one's 1
    q_mean: float = 0.0
    k_mean: float = 0.0
    v_mean: float = 0.0
    late_v: bool = False  # V is small but in the last keys, which are visited first: sums in fp16 overflow
    sink: bool = False  # the first keys have most of every query's weight, and little V
    smooth_k: bool = True
    seed: int = 0
    family: str = "mma"
    half_sums: bool = False  # of a row that sums in fp16
    wide_blocks: int = 96  # the largest head_dim at which the mma family's int8_int8 scales P by blocks of 128 keys
    scale: float | None = None
    lse: bool = True  # where it is not asked for, rows may have other kernels
    step: int | None = None  # keys that softmax takes at a time, where it is not the family's number
    loud_v: int = 0  # every so many keys one has a hundred times the V: its block is not even


def near_lse_max(case: Case) -> float:
    """How far a case's LSE may be from the reference's."""
    return NEAR_LSE[case.precision.partition("_")[0]]


def tensors(case: Case) -> list[torch.Tensor]:
    """Q, K and V of a case, in memory as it says, NaN around them."""
    generator = torch.Generator().manual_seed(100 * case.seqlen_q + case.seqlen_k)
    made = []
    shapes = [(case.heads_kv * case.group, case.seqlen_q), *[(case.heads_kv, case.seqlen_k)] * 2]
    for (heads, length), factor, mean in zip(
        shapes, (case.factor, case.factor, 1), (case.q_mean, case.k_mean, case.v_mean), strict=True
    ):
        values = torch.randn(case.batch, heads, length, case.head_dim, generator=generator) * factor
        values += mean * torch.randn(case.head_dim, generator=generator)
        if len(made) == 1:
            values *= torch.linspace(case.rise, 1, length)[:, None]
        if case.late_v and len(made) == 2:
            values = 0.02 * values + (torch.arange(length) >= length - LATE_KEYS)[:, None]
        if case.loud_v and len(made) == 2:
            values[:, :, :: case.loud_v] *= 100
        if case.sink and made:
            values[:, :, :4] = values[:, :, :4] * 0.05 if len(made) == 2 else values[:, :, :4] + SINK
        elif case.sink:
            values += SINK
        made.append(gpu_kit.place(values.to(TYPES[case.dtype]), case.memory, float("nan"))[0])
    return made


def attend(path: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: str = "") -> call.Outcome:
    """Runs a case; AssertionError where it fails or writes outside its memory."""
    os.environ["EMULATOR_SEED"] = str(case.seed)
    poison = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
    out, whole = gpu_kit.place(poison, case.memory, gpu_kit.SENTINEL, margin=512)
    options: dict[str, Any] = {"precision": case.precision, "causal": case.causal, "smooth_k": case.smooth_k}
    made = call.attention(path, q, k, v, out=out, row=row, scale=case.scale, with_lse=case.lse, **options)
    assert made.status == 0, made.error
    assert made.outside == []
    assert int((whole == gpu_kit.SENTINEL).sum()) >= whole.numel() - out.numel(), "wrote outside the output"
    return made


def figures(path: str, case: Case, row: str = "") -> dict[str, float]:
    """Errors against the reference and against float64."""
    q, k, v = tensors(case)
    made = attend(path, case, q, k, v, row)
    options: dict[str, Any] = {"precision": case.precision, "is_causal": case.causal, "smooth_k": case.smooth_k}
    exact, exact_lse = gpu_kit.exact(q, k, v, case.causal, case.scale)
    options |= {"family": case.family, "half_sums": case.half_sums, "scale": case.scale, "block_n": case.step}
    if (case.family, case.precision) == ("mma", "int8_int8"):
        if case.head_dim <= case.wide_blocks:
            options["block_n"] = recipes.WIDE_BLOCK
        else:
            options["even_v"] = case.head_dim <= 128
    near, near_lse = reference.attention(q, k, v, **options)
    lse = made.lse if case.lse else near_lse
    return {
        "finite": float(made.out.isfinite().all() and lse.isfinite().all()),
        "near": gpu_kit.relative_l1(made.out, near), "near_lse": float((lse - near_lse).abs().max()),
        "error": gpu_kit.relative_l1(made.out, exact), "lse_error": float((lse - exact_lse).abs().max()),
        "reference_error": gpu_kit.relative_l1(near, exact), "outputs": float(made.out.numel()),
        "cosine": float(torch.cosine_similarity(made.out.double().flatten(), exact.double().flatten(), 0)),
    }  # fmt: skip


def check_figures(found: dict[str, float], case: Case, near: float | None = None) -> None:
    """What figures() must be for inputs like N(0, 1); near: how far from the reference, if not as far as usual."""
    assert found["finite"], "outputs left unwritten or not finite"
    assert found["near"] <= (near or NEAR[case.precision]), found
    assert case.family != "mma" or found["near_lse"] <= near_lse_max(case), found
    assert found["error"] <= gpu_kit.allowed(ACCURACY[case.precision], int(found["outputs"])), found
    assert found["lse_error"] <= gpu_kit.lse_error_max(case.precision), found


def check_scores_of_any_size(found: dict[str, float], case: Case) -> None:
    """What figures() must be for INT8 scores far from N(0, 1)'s."""
    assert found["finite"], found
    assert found["near"] <= 2 * NEAR[case.precision], found
    # A code that rounds the other way moves a score in proportion to its size.
    assert found["near_lse"] <= near_lse_max(case) * max(1, case.factor**2 * case.rise), found


def bits(path: str, case: Case) -> tuple[list[int], list[int]]:
    """The output's and the LSE's bits."""
    made = attend(path, case, *tensors(case))
    return made.out.contiguous().view(torch.int16).flatten().tolist(), made.lse.view(torch.int32).flatten().tolist()


def placement(path: str, case: Case, name: str, where: list[tuple[int, ...]], value: float) -> None:
    """With `value` at indices of Q, K or V; AssertionError where NaN or Inf appear elsewhere than exact."""
    q, k, v = made = tensors(case)
    if name == "k" and case.precision.startswith("int8"):  # a value that INT8 rounds to 0 gives NaN: keep clear
        channel = q[..., where[0][3]]
        channel.copy_(torch.where(channel < 0, channel.clamp(max=-0.25), channel.clamp(min=0.25)))
    for index in where:
        made["qkv".index(name)][index] = value
    want, _ = gpu_kit.exact(q, k, v, case.causal, case.scale)
    out = attend(path, case, q, k, v).out
    assert torch.equal(torch.isnan(out), torch.isnan(want)), "NaN elsewhere than in exact attention"
    infinite, finite = torch.isinf(want), torch.isfinite(want)
    assert torch.equal(torch.isinf(out), infinite), "Inf elsewhere than in exact attention"
    assert torch.equal(out[infinite].double(), want[infinite]), "sign of Inf"
    if finite.any():
        assert gpu_kit.relative_l1(out[finite], want[finite]) <= 2 * ACCURACY[case.precision]
