# SPDX-License-Identifier: Apache-2.0
"""What masks, windows and packed sequences cost: ratios to the same row without them, and to the default row.

One shape, 16-bit inputs, end to end (quantization included), CUDA events. Every contender of a row is forced onto it
through the C ABI; outputs are checked against float64 attention on sampled queries before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from native_call import NativeCall, Packed
from report import clocks, default_path, environment, write_json
from timing import Timing, measure

import sagert
from sagert import codes, native
from sagert.registry import current_device
from sagert.registry.selection import ask

BLOCK = 128  # side of the squares that the half-banded mask hides by turns
MASK_BAR = 1.25  # at most, a float mask's time over none, on the same row
SKIP_BAR = 1.7  # at least, no mask's time over that of a mask which hides half the blocks, on the same row
PACKED_SHARES = (1.0, 0.25, 0.5, 0.25)  # lengths of the packed sequences, in shares of the longest
CHECKED_ROWS = 128
LARGEST_ERROR = 0.2  # a kernel that is this far off computes something else


@dataclass(frozen=True)
class Contender:
    """One way to compute: what the call is given beyond q, k, v, and what its time is compared with."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    against: str = "no mask"
    at_most: float | None = None  # its time over the other's
    at_least: float | None = None  # the other's time over its own


def half_of_the_blocks(length: int, device: torch.device) -> torch.Tensor:
    """bool ``[S, S]``: every other block of keys, by turns, so that half of them are hidden and none is cut."""
    block = torch.arange(length, device=device) // BLOCK
    return (block[:, None] + block) % 2 == 0


def band_of_half(length: int, device: torch.device) -> torch.Tensor:
    """bool ``[S, S]``: a band of blocks along the diagonal that leaves half of the blocks hidden."""
    block = torch.arange(length, device=device) // BLOCK
    count = int(block[-1]) + 1
    width = next(w for w in range(count) if 2 * (count * (2 * w + 1) - w * (w + 1)) >= count * count)
    return (block[:, None] - block).abs() <= width


def contenders(length: int, device: torch.device) -> list[Contender]:
    """The masks and windows of a problem, each beside what it is compared with."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    zeros = torch.zeros(length, length, device=device)
    attends = torch.ones(length, length, dtype=torch.bool, device=device)
    return [
        Contender("no mask"),
        Contender("bool mask, all attended", {"mask": attends}),
        Contender("fp16 mask", {"mask": zeros.half()}, at_most=MASK_BAR),
        Contender("bf16 mask", {"mask": zeros.bfloat16()}, at_most=MASK_BAR),
        Contender("fp32 mask", {"mask": zeros}, at_most=MASK_BAR),
        Contender("half the blocks masked", {"mask": half_of_the_blocks(length, device)}, at_least=SKIP_BAR),
        Contender("half masked, a band", {"mask": band_of_half(length, device)}, at_least=SKIP_BAR),
        Contender("causal", {"causal": True}),
        Contender("causal as a bool mask", {"mask": causal}, against="causal"),
        Contender("window 512, 512", {"window": (512, 512)}),
        Contender("window 512, 0, causal", {"window": (512, 0), "causal": True}, against="causal"),
    ]


def visible(given: dict[str, Any], rows: torch.Tensor, length: int) -> torch.Tensor:
    """Which keys the queries `rows` see: bool ``[R, S]``."""
    keys = torch.arange(length, device=rows.device)
    seen = torch.ones(len(rows), length, dtype=torch.bool, device=rows.device)
    mask = given.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask[rows]
    if given.get("causal"):
        seen &= keys <= rows[:, None]
    left, right = given.get("window", (length, length))
    return seen & (keys >= rows[:, None] - left) & (keys <= rows[:, None] + right)


def slice_error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> float:
    """Relative L1 error against float64 attention of the last rows of the first head; `seen` is theirs."""
    rows = slice(q.shape[2] - len(seen), q.shape[2])
    scores = q[0, 0, rows].double() @ k[0, 0].double().T * q.shape[3] ** -0.5
    want = torch.softmax(scores.masked_fill(~seen, -float("inf")), -1) @ v[0, 0].double()
    return float((out[0, 0, rows].double() - want).abs().sum() / want.abs().sum())


def rows_of(precision: str, shape: tuple[int, int, int, int], info: sagert.Device) -> list[tuple[str, str]]:
    """(label, row id): the row that plain attention takes, and the one that a bool mask takes."""
    batch, heads, length, head_dim = shape
    found: list[tuple[str, str]] = []
    for label, flags in (("default row", 0), ("masked row", codes.FLAG_MASK)):
        request = native.Request(
            batch=batch,
            heads_q=heads,
            heads_kv=heads,
            seqlen_q=length,
            seqlen_k=length,
            head_dim=head_dim,
            head_dim_v=head_dim,
            dtype=codes.dtype_code("bfloat16"),
            precision=codes.precision_code(precision),
            flags=flags,
            mask_dtype=codes.mask_dtype_code("bool"),
        )
        row = ask(request, info.to_native()).row
        if row is not None and row not in (known for _, known in found):
            found.append((label, row))
    return found


def run_precision(
    precision: str, shape: tuple[int, int, int, int], rounds: int, info: sagert.Device
) -> list[dict[str, Any]]:
    """Checks and times every contender that a row of the precision serves; ratios are within the row."""
    batch, heads, length, head_dim = shape
    device = torch.device("cuda")
    generator = torch.Generator(device=device).manual_seed(0)
    size = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3))
    checked = torch.arange(max(0, length - CHECKED_ROWS), length, device=device)
    points: list[dict[str, Any]] = []
    ways = contenders(length, device)
    calls = {}
    for label, row in rows_of(precision, shape, info):
        for way in ways:
            out = torch.full_like(q, float("nan"))
            try:
                call = NativeCall(q, k, v, out, precision=precision, row=row, **way.given)
                call.run()
            except sagert.errors.UnsupportedError:
                continue
            error = slice_error(out, q, k, v, visible(way.given, checked, length))
            if not error <= LARGEST_ERROR:
                raise RuntimeError(f"{row}, {way.name}: wrong result, relative L1 {error:.3f}")
            calls[f"{row}|{way.name}"] = call.run
            points.append({"precision": precision, "row": row, "is": label, "name": way.name, "relative_l1": error})
    timings = measure(calls, rounds)
    bars = {way.name: way for way in ways}
    base = next((p["row"] for p in points if p["is"] == "default row"), None)
    for point in points:
        timing = timings[f"{point['row']}|{point['name']}"]
        way = bars[point["name"]]
        point |= {"ms": timing.median, "ms_p10": timing.low, "ms_p90": timing.high, "samples": timing.samples}
        point |= compared(timing, timings.get(f"{point['row']}|{way.against}"), way)
        default = timings.get(f"{base}|no mask")
        if default is not None:
            point["over_default_row"] = timing.median / default.median
    return points


def compared(timing: Timing, other: Timing | None, way: Contender) -> dict[str, Any]:
    """The ratio that a contender's bar is about, and whether it is met."""
    if other is None or way.name == way.against:
        return {}
    found: dict[str, Any] = {"against": way.against, "ratio": timing.median / other.median}
    if way.at_most is not None:
        found |= {"bar": f"<= {way.at_most}", "met": found["ratio"] <= way.at_most}
    if way.at_least is not None:
        faster = other.median / timing.median
        found |= {"faster": faster, "bar": f">= {way.at_least} faster", "met": faster >= way.at_least}
    return found


def run_packed(precision: str, shape: tuple[int, int, int, int], rounds: int) -> list[dict[str, Any]]:
    """Packed sequences of unequal lengths beside the same ones padded to the longest, with a mask for the padding."""
    batch, heads, length, head_dim = shape
    device = torch.device("cuda")
    lengths = [int(length * PACKED_SHARES[i % len(PACKED_SHARES)]) for i in range(batch)]
    bounds = torch.tensor([sum(lengths[:i]) for i in range(batch + 1)], dtype=torch.int32, device=device)
    total = sum(lengths)
    packed = Packed(bounds, bounds, max(lengths), max(lengths))
    q, k, v = (torch.randn(total, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    padded = [torch.zeros(batch, heads, max(lengths), head_dim, device=device, dtype=q.dtype) for _ in range(3)]
    for source, target in zip((q, k, v), padded, strict=True):
        for i, count in enumerate(lengths):
            target[i, :, :count] = source[int(bounds[i]) : int(bounds[i]) + count].transpose(0, 1)
    keys = torch.arange(max(lengths), device=device)
    mask = (keys < torch.tensor(lengths, device=device)[:, None])[:, None, None]
    out, padded_out = torch.empty_like(q), torch.empty_like(padded[0])
    calls = {
        "packed": NativeCall(q, k, v, out, precision=precision, packed=packed),
        "padded, keys masked": NativeCall(*padded, padded_out, precision=precision, mask=mask),
        "padded, computed in full": NativeCall(*padded, padded_out, precision=precision),
    }
    for call in list(calls.values())[:2]:
        call.run()
    last = padded_out[-1, :, : lengths[-1]].transpose(0, 1)
    error = float((out[total - lengths[-1] :].float() - last.float()).abs().sum() / last.float().abs().sum())
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"{precision}: packed and padded results differ, relative L1 {error:.3f}")
    timings = measure({name: call.run for name, call in calls.items()}, rounds)
    return [
        {
            "precision": precision,
            "name": name,
            "lengths": lengths,
            "ms": timing.median,
            "ms_p10": timing.low,
            "ms_p90": timing.high,
            "samples": timing.samples,
            "against": "packed",
            "ratio": timing.median / timings["packed"].median,
        }
        for name, timing in timings.items()
    ]


def line(point: dict[str, Any]) -> str:
    """One contender in a line: milliseconds, the ratio and its bar."""
    parts = [f"  {point['name']:<28}{point['ms']:9.3f} ms"]
    if "ratio" in point:
        parts.append(f"{point['ratio']:7.3f} x {point['against']}")
    if "faster" in point:
        parts.append(f"({point['faster']:.2f} times faster)")
    if "over_default_row" in point:
        parts.append(f"{point['over_default_row']:7.3f} x the default row")
    if "bar" in point:
        parts.append(f"bar {point['bar']}: {'met' if point['met'] else 'MISSED'}")
    return "  ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[4, 32, 4096, 128], metavar=("B", "H", "S", "D"))
    parser.add_argument("--precisions", default="", help="comma separated; default: all whose rows serve masks")
    parser.add_argument("--rounds", type=int, default=10, help="samples per contender")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/masks-<device>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/masks.py needs a CUDA device that torch can use\n")
        return 1
    info = current_device()
    here = [r for r in sagert.kernels() if r.capability_min <= info.capability <= r.capability_max]
    named = args.precisions.split(",") if args.precisions else []
    precisions = named or list(dict.fromkeys(r.precision for r in here if "mask" in r.flags))
    shape = tuple(args.shape)
    run: dict[str, Any] = {"environment": environment(), "clocks_before": clocks(), "shape": list(shape)}
    run |= {"points": [], "packed": []}
    for precision in precisions:
        run["points"] += run_precision(precision, shape, args.rounds, info)
        torch.cuda.empty_cache()
        if any("varlen" in r.flags and r.precision == precision for r in here):
            run["packed"] += run_packed(precision, shape, args.rounds)
        torch.cuda.empty_cache()
    run["clocks_after"] = clocks()

    for row in dict.fromkeys(p["row"] for p in run["points"]):
        mine = [p for p in run["points"] if p["row"] == row]
        sys.stdout.write(f"{row}, {mine[0]['is']}, {'x'.join(map(str, shape))}, end to end\n")
        sys.stdout.writelines(line(point) + "\n" for point in mine)
    for precision in dict.fromkeys(p["precision"] for p in run["packed"]):
        mine = [p for p in run["packed"] if p["precision"] == precision]
        sys.stdout.write(f"{precision}, packed sequences of {mine[0]['lengths']}\n")
        sys.stdout.writelines(line(point) + "\n" for point in mine)
    path = args.out or default_path("masks", run)
    write_json(path, run)
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
