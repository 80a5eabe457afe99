# SPDX-License-Identifier: Apache-2.0
"""Whose arithmetic the reference follows, and what that makes of Q, K and V before they are multiplied."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sagert.quantize import (
    V_BLOCK,
    V_MAX,
    k_shift,
    q_means,
    quantize_key_groups,
    quantize_rows,
    quantize_v_fp8,
    quantize_v_half,
    quantize_v_int8,
    quantize_v_int8_even,
    quantize_v_int8_groups,
    sampled_keys,
    v_largest,
    v_mean,
    v_units,
)

LOG2E = math.log2(math.e)
LOG2_448 = math.log2(448.0)  # 448 is e4m3's largest value
# Tiled families move a row's maximum only when a score's exponent exceeds it by the slack: log2 of P at the maximum,
# and the slack, by how P is rounded. P in 16 bits is scaled to keep small weights out of fp16's subnormal numbers, and
# less where products are summed in fp16.
TILED_LOG2_P = {"fp8": (LOG2_448, 2.0**-8), "fp16": (8.0, 6.0), "int8": (0.0, 14.0)}
HALF_LOG2_P = TILED_LOG2_P | {"fp16": (4.0, 4.0)}
PRECISIONS = ("int8_fp16", "int8_fp8", "int8_int8")  # of every family, and what CPU tensors are served
INT4_PRECISIONS = ("int4_fp16", "int4_fp8", "int4_int8")  # of the mma family
TILED = ("wgmma", "mma")  # families that scale K by groups of keys and take V's mean off; CPU tensors run on "portable"
BLOCKS = {"portable": 128, "wgmma": 128, "mma": 64}  # keys that share scales, or that softmax takes at a time
WIDE_BLOCK = 128  # of the mma family's int8_int8, where a row has registers for it
CODES = {"int8": 127.0, "int4": 7.0}  # largest value of Q and K
FP8_MAX, FP8_MAX_HALF = 448.0, 2.25  # largest value of V in e4m3; times 448 and 64 keys the latter stays within fp16
LEADING_KEYS = 4  # attention sinks in most models (StreamingLLM, arXiv 2309.17453): see Recipe.exact_leading


class Recipe(NamedTuple):
    """Whose arithmetic to follow. `half_sums`: the mma family's rows that sum the products of 64 keys in fp16."""

    precision: str
    smooth_k: bool = True
    family: str = "portable"
    block_n: int = BLOCKS["portable"]
    half_sums: bool = False
    even_v: bool = False  # of the mma family's int8_int8: blocks whose channels share a factor

    @property
    def tiled(self) -> bool:
        """Whether K is scaled by groups of keys, and V's mean taken off."""
        return self.family in TILED

    @property
    def qk(self) -> str:
        """Type of Q and K."""
        return self.precision.partition("_")[0]

    @property
    def pv(self) -> str:
        """Type of P and V; "fp16" is the inputs' own, or, with half_sums, scaled fp16."""
        return self.precision.partition("_")[2]

    @property
    def half_output(self) -> bool:
        """Whether O is summed in fp16, over all keys."""
        return self.family == "wgmma" and self.pv == "fp8"

    @property
    def exact_leading(self) -> bool:
        """Whether the first keys' P and V stay in fp32, so that the others need not share their scales."""
        return self.family == "wgmma" and self.pv == "int8"

    @property
    def groups_v(self) -> bool:
        """Whether channels of V share scales, in units of the channels."""
        return self.family == "wgmma" and self.pv == "int8"

    @property
    def key_block(self) -> int:
        """Keys of a block in which groups of them share scales of K, where `tiled`."""
        return self.block_n if self.precision == "int8_int8" else BLOCKS[self.family]

    @property
    def log2_p(self) -> tuple[float, float]:
        """log2 of P at a row's maximum, and by how much a score may exceed that maximum."""
        if not self.tiled:
            return (LOG2_448 if self.pv == "fp8" else 0.0), 0.0
        return (HALF_LOG2_P if self.half_sums else TILED_LOG2_P)[self.pv]


class KeyValues(NamedTuple):
    """Quantized K and V of N key heads, values of integers and of e4m3 held in fp32."""

    k: Tensor  # [N, Sk, D]
    k_scale: Tensor  # [N, Sk, 1]
    k_shift: Tensor  # [N, 1, D]
    v: Tensor  # [N, Sk, Dv], non-finite entries as 0
    v_scale: Tensor  # [N, 1 or blocks, Dv]
    v_mean: Tensor | None  # [N, 1, Dv]
    positive: Tensor | None  # [N, Sk, Dv], where V is +inf or NaN; None where V is finite
    negative: Tensor | None  # [N, Sk, Dv], where V is -inf or NaN
    rough_k: Tensor | None = None  # [N, Sk, D], K as it is, where queries' means are multiplied with it
    leading_v: Tensor | None = None  # [N, LEADING_KEYS, Dv], V less its mean, in its units, with exact_leading
    v_unit: Tensor | None = None  # [N, 1, Dv], which v_scale is in


class Queries(NamedTuple):
    """Quantized Q of N key heads, whose query heads are rows of one matrix."""

    values: Tensor  # [N, rows, D], integers held in fp32
    scale: Tensor  # [N, rows, 1], with scale * log2(e) in it
    mean: Tensor | None  # [N, rows, D], times scale * log2(e): taken off the queries before


def recipe_of(
    precision: str,
    smooth_k: bool = True,
    family: str = "portable",
    block_n: int | None = None,
    half_sums: bool = False,
    even_v: bool = False,
) -> Recipe:
    """A recipe that has a reference; ValueError for others.

    P in bytes, and sums in fp16, fix its blocks of keys; the mma family's int8_int8 has rows of either of two.
    """
    accepted = PRECISIONS + (INT4_PRECISIONS if family == "mma" else ())
    if family not in BLOCKS or precision not in accepted:
        raise ValueError(f"{precision=} in {family=} has no reference: use one of {accepted} in {[*BLOCKS]}")
    fixed = precision.endswith("_int8")
    if half_sums and (family != "mma" or fixed):
        raise ValueError(f"{precision=} in {family=} does not sum in fp16: leave half_sums out")
    if even_v and (family != "mma" or precision != "int8_int8"):
        raise ValueError(f"{precision=} in {family=} has no even blocks of V: leave even_v out")
    blocks = BLOCKS | ({"portable": V_BLOCK} if fixed else {})
    wide = family == "mma" and precision == "int8_int8" and block_n == WIDE_BLOCK
    if block_n is None or ((fixed or half_sums) and not wide):
        block_n = blocks[family]
    return Recipe(precision, smooth_k, family, block_n, half_sums, even_v)


def with_marks(kv: KeyValues, positive: Tensor, negative: Tensor) -> KeyValues:
    """`kv` with V's non-finite entries, if there are any."""
    if positive.any() or negative.any():
        return kv._replace(positive=positive, negative=negative)
    return kv


def quantize_heads(k: Tensor, v: Tensor, recipe: Recipe) -> KeyValues:
    """Quantizes k [N, Sk, D] and v [N, Sk, Dv] of some key heads."""
    kf, vf = k.float(), v.float()
    sample = kf[:, sampled_keys(kf.shape[1]).to(kf.device)] if recipe.tiled else kf
    shift = k_shift(sample) if recipe.smooth_k else kf.new_zeros(kf.shape[0], 1, kf.shape[2])
    if recipe.tiled:
        k8, k_scale = quantize_key_groups(kf - shift, recipe.key_block, CODES[recipe.qk])
    else:
        k8, k_scale = quantize_rows(kf - shift, math.inf)
    nan = vf.isnan()
    positive, negative = nan | (vf == math.inf), nan | (vf == -math.inf)
    mean = v_mean(vf) if recipe.tiled and (recipe.pv != "fp16" or recipe.half_sums) else None
    unit = None
    if mean is not None:
        vf = vf - mean
    if recipe.pv == "fp8":
        fixed = FP8_MAX_HALF if recipe.half_sums else FP8_MAX
        values, v_scale = quantize_v_fp8(vf, v_largest(vf) if recipe.half_output else fixed)
    elif recipe.groups_v:
        unit = v_units(vf)
        vf = vf / unit
        values, v_scale = quantize_v_int8_groups(vf, recipe.block_n)
    elif recipe.even_v:
        values, v_scale = quantize_v_int8_even(vf, recipe.block_n)
    elif recipe.pv == "int8":
        values, v_scale = quantize_v_int8(vf, recipe.block_n, *(() if recipe.tiled else (V_MAX, False)))
    elif recipe.half_sums:
        values, v_scale = quantize_v_half(vf)
    else:
        values, v_scale = torch.where(vf.isfinite(), vf, 0.0), vf.new_ones(1)
    rough = kf if recipe.qk == "int4" else None
    leading = None
    if recipe.exact_leading:
        first = vf[:, :LEADING_KEYS]
        leading = torch.where(first.isfinite(), first, 0.0).to(v.dtype).float()
    kv = KeyValues(k8, k_scale, shift, values, v_scale, mean, None, None, rough, leading, unit)
    return with_marks(kv, positive, negative)


def quantize_queries(q: Tensor, scale: float, recipe: Recipe, length: int) -> Queries:
    """Quantizes q [N, rows, D], rows a multiple of `length`: queries of one head after those of another.

    The portable family scales before it quantizes, the tiled ones after: what lies between two integers may differ.
    INT4 takes the mean of each block of queries off first.
    """
    factor = torch.tensor(scale * LOG2E, dtype=torch.float32, device=q.device)
    if not recipe.tiled:
        return Queries(*quantize_rows(q.float() * factor, math.nan), None)
    qf, mean = q.float(), None
    if recipe.qk == "int4":
        means = q_means(q.reshape(q.shape[0], -1, length, q.shape[2])).reshape(q.shape)
        qf, mean = qf - means, means * factor
    values, row = quantize_rows(qf, math.nan, CODES[recipe.qk])
    return Queries(torch.copysign(torch.ones_like(factor), factor) * values, row * factor.abs(), mean)


def means_scores(queries: Queries, kv: KeyValues, keys: slice) -> Tensor | None:
    """What the queries' means add to scores [N, rows, keys]: products with K less its shift, 0 where K is not finite.

    None where no mean was taken off.
    """
    if queries.mean is None or kv.rough_k is None:
        return None
    products = queries.mean @ kv.rough_k[:, keys].transpose(1, 2) - (queries.mean * kv.k_shift).sum(-1, keepdim=True)
    return torch.where(products.isfinite(), products, 0.0)
