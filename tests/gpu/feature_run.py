# SPDX-License-Identifier: Apache-2.0
"""Runs a feature case through the public API, or through the C ABI on a row of choice, between poisoned guard bands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from feature_cases import FeatureCase
from feature_masks import draw_mask
from feature_oracle import exact, exact_varlen
from gpu_kit import allowed, lse_error_max, place
from native_call import NativeCall, Packed

import sagert
from sagert import codes, native
from sagert.registry.selection import Selection, ask

GUARD = 8192.0  # in every floating-point type exactly
MARGIN = 2048  # elements on either side of an output
LSE_MARGIN = 64
WORKSPACE_MARGIN = 1 << 16  # bytes
RUNS_MIN = 3000  # of a case on a row, where rows of two precisions serve every feature
FLAG_RUNS_MIN = 20
OTHER_FLAGS = ("quantized_kv", "dropout", "grad")  # these the cases do not ask for; quantized_kv has tests of its own


@dataclass
class Problem:
    """A case's tensors: q, k, v as the public function takes them, and the buffers that they and the mask lie in."""

    case: FeatureCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    packed: Packed | None = None
    wholes: dict[str, torch.Tensor] = field(default_factory=dict)

    def placed(self, size: tuple[int, ...], memory: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """NaN of `size`, ``[B, H, S, D]`` or ``[total, H, D]``, in a buffer of GUARD."""
        nan = torch.full(size, float("nan"), dtype=dtype, device=self.q.device)
        if len(size) == 4:
            return place(nan, memory, GUARD, MARGIN)
        view, whole = place(nan.transpose(0, 1)[None], memory, GUARD, MARGIN)
        return view[0].transpose(0, 1), whole

    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the output, and the whole buffer it lies in."""
        return self.placed((*self.q.shape[:-1], self.case.head_dim_v), self.case.memory[3], self.q.dtype)

    def lse_shape(self) -> tuple[int, ...]:
        return (self.q.shape[1], self.q.shape[0]) if self.packed else tuple(self.q.shape[:3])


def cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    """int32 ``[N + 1]``, ascending from 0."""
    sums = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(sums, dtype=torch.int32, device=device)


def build(case: FeatureCase, device: torch.device, seed: int = 0) -> Problem:
    """Q, K and V from N(0, 1) and the mask, drawn on the device: the same for a case and a seed on every run."""
    generator = torch.Generator(device=device).manual_seed(97 * case.index + seed)
    wholes: dict[str, torch.Tensor] = {}
    totals = (case.seqlen_q, case.seqlen_k)
    if case.segments is not None:
        totals = (sum(q for q, _ in case.segments), sum(k for _, k in case.segments))

    def draw(name: str, heads: int, length: int, dim: int, memory: str) -> torch.Tensor:
        size = (1 if case.segments is not None else case.batch, heads, length, dim)
        values = torch.randn(size, generator=generator, device=device).to(case.dtype)
        view, wholes[name] = place(values, memory, float("nan"))
        return view if case.segments is None else view[0].transpose(0, 1)

    q = draw("q", case.heads, totals[0], case.head_dim, case.memory[0])
    k = draw("k", case.heads_kv, totals[1], case.head_dim, case.memory[1])
    v = draw("v", case.heads_kv, totals[1], case.head_dim_v, case.memory[2])
    problem = Problem(case, q, k, v, wholes=wholes)
    if case.mask is not None:
        problem.mask, wholes["attn_mask"] = draw_mask(case.mask, case.sizes, generator, device)
    if case.segments is not None:
        cu_q, cu_k = (cumulative([pair[i] for pair in case.segments], device) for i in (0, 1))
        wholes |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        problem.packed = Packed(cu_q, cu_k, case.seqlen_q, case.seqlen_k)
    return problem


def expected(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 output and LSE, in the shapes of the public function's."""
    case = problem.case
    options: dict[str, Any] = {
        "causal": case.causal,
        "bottom_right": case.bottom_right,
        "window": case.window,
        "scale": case.scale,
    }
    if case.segments is not None:
        return exact_varlen(problem.q, problem.k, problem.v, case.segments, **options)
    return exact(problem.q, problem.k, problem.v, mask=problem.mask, **options)


def options_of(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of the public function for what the case asks, those that plain attention has not left out."""
    case = problem.case
    given: dict[str, Any] = {"is_causal": case.causal, "scale": case.scale, "enable_gqa": case.group > 1}
    if problem.mask is not None:
        given["attn_mask"] = problem.mask
    if case.bottom_right:
        given["causal_alignment"] = "bottom_right"
    if case.window is not None:
        given["window"] = case.window
    if not case.smooth_k:
        given["smooth_k"] = False
    return given


def public(
    problem: Problem, precision: str, out: torch.Tensor | None = None, lse: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sagert.attention` or `sagert.attention_varlen`; the LSE is None where it was not asked for."""
    given = options_of(problem) | {"precision": precision, "return_lse": problem.case.lse if lse is None else lse}
    if out is not None:
        given["out"] = out
    tensors = (problem.q, problem.k, problem.v)
    if problem.packed is None:
        result = sagert.attention(*tensors, **given)
    else:
        p = problem.packed
        lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k)
        result = sagert.attention_varlen(*tensors, *lengths, **given)
    return result if given["return_lse"] else (result, None)


def request(case: FeatureCase, precision: str, flags: int = 0) -> native.Request:
    """What the C ABI is asked for this case; `flags` are added."""
    dtype = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    left, right = (-1 if side is None else side for side in case.window or (None, None))
    return native.Request(
        batch=case.batch,
        heads_q=case.heads,
        heads_kv=case.heads_kv,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        dtype=codes.dtype_code(dtype),
        precision=codes.precision_code(precision),
        flags=case.flags | flags,
        mask_dtype=codes.mask_dtype_code(case.mask.dtype) if case.mask else 0,
        window_left=left,
        window_right=right,
    )


def answer(case: FeatureCase, precision: str, device: sagert.Device) -> Selection:
    """Which row of `device` serves a case, and which others would."""
    return ask(request(case, precision), device.to_native())


@dataclass
class Run:
    """An output, its LSE, and device bools by what each proves; `guarded` fails where one is False."""

    out: torch.Tensor
    lse: torch.Tensor | None
    checks: dict[str, torch.Tensor]


def unchanged(whole: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Whether two tensors have the same bytes, as a bool tensor on the device."""
    return (whole.view(torch.uint8) == before.view(torch.uint8)).all()


def guarded(problem: Problem, precision: str, row: str | None = None, two_calls: bool = False) -> Run:
    """One call into poisoned memory, with checks that nothing but the outputs was written.

    Without `row` it is the public function's call; with one the C ABI's, on that row, whose workspace and LSE lie
    between guard bands too, and with `two_calls` the quantized keys and values. Outputs hold NaN beforehand, the other
    memory bytes that are NaN.
    """
    case, checks = problem.case, {}
    before = {name: whole.clone() for name, whole in problem.wholes.items()}
    out, whole = problem.output()
    outside = torch.ones_like(whole, dtype=torch.bool)
    torch.as_strided(outside, out.shape, out.stride(), out.storage_offset()).fill_(False)
    if row is None:
        result, lse = public(problem, precision, out)
        if result.data_ptr() != out.data_ptr() and out.numel():
            raise AssertionError(f"{precision}, {case}: the result is not in `out`")
    else:
        band = torch.full((2 * LSE_MARGIN + out[..., 0].numel(),), GUARD, device=out.device)
        lse = band[LSE_MARGIN : band.numel() - LSE_MARGIN].view(problem.lse_shape()) if case.lse else None
        call = NativeCall(
            problem.q, problem.k, problem.v, out, precision=precision, lse=lse, row=row, mask=problem.mask,
            causal=case.causal, bottom_right=case.bottom_right, window=case.window, packed=problem.packed,
            scale=case.scale, smooth_k=case.smooth_k, two_calls=two_calls, margin=WORKSPACE_MARGIN,
        )  # fmt: skip
        call.run()
        checks["the surroundings of the workspace, or of keys and values, were written"] = call.intact()
        edges = torch.cat((band[:LSE_MARGIN], band[band.numel() - LSE_MARGIN :]))
        checks["the LSE's surroundings were written"] = (edges == GUARD).all()
    checks["memory outside the output was written"] = ((whole == GUARD) | ~outside).all()
    for name, was in before.items():
        checks[f"{name} was modified"] = unchanged(problem.wholes[name], was)
    return Run(out, lse, checks)


def measured(case: FeatureCase, run: Run, want: torch.Tensor, want_lse: torch.Tensor) -> dict[str, Any]:
    """What is recorded of a run on finite inputs, read from the device at once: errors, and every check that failed."""
    out, blind = run.out.double(), torch.isneginf(want_lse)
    blind_out = blind.transpose(0, 1) if case.segments is not None else blind
    checks = run.checks | {
        "outputs are not finite, or left unwritten": torch.isfinite(out).all(),
        "a query that sees no key gives other than 0": (~blind_out[..., None] | (out == 0)).all(),
    }
    lse_error = out.new_zeros(())
    if run.lse is not None and run.lse.numel():
        checks["the LSE is -inf elsewhere than at queries that see no key"] = (torch.isneginf(run.lse) == blind).all()
        lse_error = (run.lse.double() - want_lse).masked_fill(blind, 0.0).abs().amax()
    norms = (out.norm() * want.norm()).clamp_min(1e-30)
    numbers = torch.stack(
        (
            (out - want).abs().sum(),
            want.abs().sum(),
            (out * want).sum() / norms,
            lse_error,
            *(check.double() for check in checks.values()),
        )
    ).tolist()
    error, size, cosine, lse_off, *passed = numbers
    return {
        "case": str(case),
        "outputs": run.out.numel(),
        "relative_l1": error / size if size else error,
        "cosine": cosine if size else 1.0,
        "lse_error": lse_off,
        "failed": [text for text, good in zip(checks, passed, strict=True) if not good],
    }


def verdict(point: dict[str, Any], row: Any, factor: float = 1.0) -> list[str]:
    """What is wrong with a measured run of a row, whose own tolerance of relative L1 counts `factor` times."""
    wrong = list(point["failed"])
    tolerance = allowed(factor * row.relative_l1, point["outputs"]) if point["outputs"] else 0.0
    if point["outputs"] and not point["relative_l1"] <= tolerance:
        wrong.append(f"relative L1 {point['relative_l1']:.5f}, allowed {tolerance:.5f}")
    if not point["lse_error"] <= lse_error_max(row.precision):
        wrong.append(f"LSE off by {point['lse_error']:.4f}")
    return wrong


def same(first: Run, second: Run) -> bool:
    """Whether two runs have the same bits of output and, where both have it, LSE."""
    if first.lse is not None and second.lse is not None and not torch.equal(first.lse, second.lse):
        return False
    return torch.equal(first.out, second.out)


def plans(case: FeatureCase, rows: list[Any], device: sagert.Device | None) -> list[tuple[Any, bool]]:
    """The `rows` that serve a case on `device`, each with whether it is the one that the public function takes.

    With None for the CPU all are, and none is left out: the reference serves every case.
    """
    if device is None:
        return [(row, True) for row in rows]
    found = []
    for precision in dict.fromkeys(row.precision for row in rows):
        chosen = answer(case, precision, device)
        mine = [row for row in rows if row.precision == precision and chosen.reasons.get(row.id) == ()]
        found += [(row, row.id == chosen.row) for row in mine]
    return found


def coverage_failures(cases: list[FeatureCase], rows: list[Any], device: sagert.Device) -> list[str]:
    """Rows, and flags of rows, that too few of the cases reach; asks selection only, so it needs no GPU."""
    runs: Counter[str] = Counter()
    by_flag: Counter[tuple[str, str]] = Counter()
    for case in cases:
        names = codes.flag_names(case.flags)
        for row, _ in plans(case, rows, device):
            runs[row.id] += 1
            by_flag.update((row.id, flag) for flag in row.flags if flag in names)
    general = {row.precision for row in rows if {"mask", "varlen"} <= set(row.flags)}
    wrong = [] if len(general) < 2 or runs.total() >= RUNS_MIN else [f"{runs.total()} runs: {dict(runs)}"]
    for row in rows:
        few = {flag: by_flag[row.id, flag] for flag in row.flags if flag not in OTHER_FLAGS}
        wrong += [f"{row.id}: {n} runs with {flag}" for flag, n in few.items() if n < FLAG_RUNS_MIN]
    return wrong
