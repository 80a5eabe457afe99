# SPDX-License-Identifier: Apache-2.0
"""Attention throughput: sagert, kernel only and end to end, beside every other attention package installed.

Random bfloat16 inputs, outputs poisoned and checked against float64 attention before anything is timed, CUDA events,
the median of interleaved samples. Writes a table, a JSON file and, with matplotlib, a plot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peers import Peer, Unavailable, contenders
from report import clocks, default_path, environment, table, write_json, write_plot
from timing import Call, measure

import sagert

SHAPES = ("4,32,1024", "4,32,4096", "4,32,8192", "4,32,16384", "2,32,32768")
CHECKED_ROWS = 256
LARGEST_ERROR = 0.2  # a kernel that is this far off computes something else


def flops(batch: int, heads: int, seqlen_q: int, seqlen_k: int, head_dim: int, causal: bool) -> float:
    """Useful floating-point operations: two products; causal counts half, as is customary."""
    return 4.0 * batch * heads * seqlen_q * seqlen_k * head_dim * (0.5 if causal else 1.0)


def slice_error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> float:
    """Relative L1 error against float64 attention on the first and last rows of the first and last head."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    rows = torch.cat([torch.arange(min(CHECKED_ROWS, length)), torch.arange(max(0, length - CHECKED_ROWS), length)])
    rows = rows.unique().to(q.device)
    error = total = 0.0
    for batch, head in ((0, 0), (q.shape[0] - 1, q.shape[1] - 1)):
        keys, values = k[batch, head // group].double(), v[batch, head // group].double()
        scores = q[batch, head, rows].double() @ keys.T * q.shape[-1] ** -0.5
        if causal:
            scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > rows[:, None], float("-inf"))
        want = torch.softmax(scores, dim=-1) @ values
        error += float((out[batch, head, rows].double() - want).abs().sum())
        total += float(want.abs().sum())
    return error / total


def run_problem(peers: list[Peer], shape: tuple[int, ...], head_dim: int, causal: bool, rounds: int) -> list[Any]:
    """Checks, then times every peer on one problem; a peer that cannot is recorded with the reason."""
    batch, heads, heads_kv, seqlen_q, seqlen_k = shape
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(h: int, s: int) -> torch.Tensor:
        return torch.randn(batch, h, s, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = draw(heads, seqlen_q), draw(heads_kv, seqlen_k), draw(heads_kv, seqlen_k)
    points: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    for peer in peers:
        kv = "" if heads == heads_kv else f"/{heads_kv}"
        point: dict[str, Any] = {
            "name": peer.name,
            "timed": peer.timed,
            "shape": f"{batch}x{heads}{kv}x{seqlen_q}" + (f"x{seqlen_k}" if seqlen_k != seqlen_q else ""),
            "seqlen_k": seqlen_k,
            "head_dim": head_dim,
            "causal": causal,
        }
        points.append(point)
        try:
            call, output = peer.prepare(q, k, v, causal)
            point["relative_l1"] = slice_error(output(), q, k, v, causal)
        except Exception as error:  # other people's packages raise anything; the table says what
            point["unavailable"] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not isinstance(error, Unavailable) and peer.name.startswith("sagert"):
                raise
            continue
        if not point["relative_l1"] <= LARGEST_ERROR:
            point["unavailable"] = f"wrong result: relative L1 {point['relative_l1']:.3f}"
            continue
        calls[f"{peer.name}|{peer.timed}"] = call
    timings = measure(calls, rounds)
    work = flops(batch, heads, seqlen_q, seqlen_k, head_dim, causal)
    for point in points:
        timing = timings.get(f"{point['name']}|{point['timed']}")
        if timing:
            point |= {"ms": timing.median, "ms_p10": timing.low, "ms_p90": timing.high, "samples": timing.samples}
            point["tflops"] = work / timing.median / 1e9
    return points


def parse_shape(text: str) -> tuple[int, ...]:
    """`B,H,S`, `B,H,Hk,S` or `B,H,Hk,S,Sk` -> (B, H, Hk, S, Sk)."""
    sizes = [int(x) for x in text.split(",")]
    if len(sizes) == 3:
        sizes = [sizes[0], sizes[1], sizes[1], sizes[2]]
    if len(sizes) == 4:
        sizes.append(sizes[3])
    if len(sizes) != 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected B,H,S or B,H,Hk,S or B,H,Hk,S,Sk")
    return tuple(sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", help="B,H,S | B,H,Hk,S | B,H,Hk,S,Sk")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--causal", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--precisions", default="", help="comma separated; default: all that this device serves")
    parser.add_argument("--rows", nargs="+", default=[], help="these kernel rows of sagert instead of precisions")
    parser.add_argument("--rounds", type=int, default=50, help="samples per contender, of 10 ms or one call")
    parser.add_argument("--quick", action="store_true", help="two shapes, few samples: does everything run?")
    parser.add_argument("--only-sagert", action="store_true", help="leave the other packages out")
    parser.add_argument("--peers", nargs="+", default=[], help="of the other packages those whose names begin so")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/attention-<device>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/attention.py needs a CUDA device that torch can use\n")
        return 1

    shapes = args.shapes or [parse_shape(s) for s in SHAPES]
    rounds = args.rounds
    if args.quick:
        shapes, rounds = shapes[:2], 3
    capability = torch.cuda.get_device_capability()
    rows = [r for r in sagert.kernels() if r.capability_min <= capability <= r.capability_max]
    precisions = args.precisions.split(",") if args.precisions else list(dict.fromkeys(r.precision for r in rows))
    peers = [p for p in contenders(precisions, args.rows) if not args.only_sagert or p.name.startswith("sagert")]
    if args.peers:
        peers = [p for p in peers if p.name.startswith(("sagert", *args.peers))]

    run: dict[str, Any] = {"environment": environment(), "clocks_before": clocks(), "points": []}
    for head_dim in args.head_dim:
        for causal in {"no": [False], "yes": [True], "both": [False, True]}[args.causal]:
            for shape in shapes:
                run["points"] += run_problem(peers, shape, head_dim, causal, rounds)
                torch.cuda.empty_cache()
    run["clocks_after"] = clocks()

    sys.stdout.write(table(run["points"]))
    for name, reason in dict.fromkeys((p["name"], p["unavailable"]) for p in run["points"] if "unavailable" in p):
        sys.stdout.write(f"left out: {name}: {reason}\n")
    path = args.out or default_path("attention", run)
    write_json(path, run)
    plotted = write_plot(path.with_suffix(".png"), run)
    sys.stdout.write(f"wrote {path}" + (f" and {path.with_suffix('.png').name}\n" if plotted else "\n"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
