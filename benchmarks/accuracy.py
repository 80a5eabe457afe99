# SPDX-License-Identifier: Apache-2.0
"""Accuracy on the standard set of distributions: sagert, SageAttention2's recipe simulated, and what is installed.

Relative L1, cosine similarity and root mean square error against float64 attention. Runs on the CUDA device where
there is one, else on the CPU, where sagert's reference computes. Writes tables and a JSON file.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import distributions
import sage2_recipe
import torch
from peers import Peer, Prepared, contenders, returned
from report import clocks, default_path, environment, write_json

import sagert
from sagert import reference

METRICS = {"relative_l1": "relative L1", "cosine": "cosine similarity", "rmse": "root mean square error"}
# The package itself, not the simulation: SageAttention 2.2 (commit d1a57a5) on one H200 in an earlier run, with other
# random numbers.
SAGE2_MEASURED: dict[str, Any] = {
    "name": "SageAttention2, as measured",
    "head_dim": 128,
    "causal": False,
    "seqlen": 4096,
    "relative_l1": {"normal": 0.0382, "channel_outliers": 0.0028, "peaky": 0.0373},
}


def simulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    return returned(lambda: sage2_recipe.attention(q, k, v, is_causal=causal))


def served() -> list[str]:
    """The precisions of this device, best rank first; without a device those of the reference."""
    if not torch.cuda.is_available():
        return list(reference.PRECISIONS)
    capability = torch.cuda.get_device_capability()
    rows = [r for r in sagert.kernels() if r.capability_min <= capability <= r.capability_max]
    return list(dict.fromkeys(r.precision for r in sorted(rows, key=lambda r: r.rank)))


def one_per_name(peers: list[Peer]) -> list[Peer]:
    """How it is timed does not matter here: end to end where there is a choice."""
    return list({peer.name: peer for peer in sorted(peers, key=lambda p: p.timed == "end to end")}.values())


def run_problem(peers: list[Peer], name: str, sizes: dict[str, Any], causal: bool) -> list[dict[str, Any]]:
    """Every peer's errors on one problem; one that cannot do it is recorded with the reason."""
    q, k, v = distributions.draw(name, **sizes)
    want, _ = reference.exact_attention(q, k, v, is_causal=causal)
    points = []
    for peer in peers:
        point = {"name": peer.name, "distribution": name, "head_dim": sizes["head_dim"], "causal": causal}
        points.append(point)
        try:
            errors = reference.error_metrics(peer.prepare(q, k, v, causal)[1](), want)
        except Exception as error:  # other people's packages raise anything; the table says what
            if peer.name.startswith("sagert") or peer.prepare is simulated:
                raise
            point["unavailable"] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            continue
        # JSON has no NaN.
        point |= {metric: value if math.isfinite(value) else None for metric, value in errors.items()}
    return points


def bar_points(seqlen: int) -> list[dict[str, Any]]:
    """SAGE2_MEASURED in the form of points, where this run is of that length."""
    if seqlen != SAGE2_MEASURED["seqlen"]:
        return []
    shared = {key: SAGE2_MEASURED[key] for key in ("name", "head_dim", "causal")}
    return [shared | {"distribution": d, "relative_l1": x} for d, x in SAGE2_MEASURED["relative_l1"].items()]


def table(points: list[dict[str, Any]], metric: str, head_dim: int, causal: bool) -> str:
    """One metric of one head dim and mask: contenders down, distributions across."""
    mine = [p for p in points if (p["head_dim"], p["causal"]) == (head_dim, causal) and p.get(metric) is not None]
    names = list(dict.fromkeys(p["distribution"] for p in mine))
    lines = [f"head_dim {head_dim}, {'causal' if causal else 'full'}: {METRICS[metric]}"]
    lines.append(f"{'':<34}" + "".join(f"{name:>18}" for name in names))
    for contender in dict.fromkeys(p["name"] for p in mine):
        cells = {p["distribution"]: f"{p[metric]:.6g}" for p in mine if p["name"] == contender}
        lines.append(f"{contender:<34}" + "".join(f"{cells.get(name, '-'):>18}" for name in names))
    return "\n".join(lines) + "\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distributions", nargs="+", default=distributions.NAMES, choices=distributions.NAMES)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--causal", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--precisions", default="", help="comma separated; default: all that this device serves")
    parser.add_argument("--rows", nargs="+", default=[], help="these kernel rows of sagert instead of precisions")
    parser.add_argument("--only-sagert", action="store_true", help="leave the other packages out")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/accuracy-<device>.json")
    args = parser.parse_args()

    precisions = args.precisions.split(",") if args.precisions else served()
    known = [p for p in contenders(precisions, args.rows) if not args.only_sagert or p.name.startswith("sagert")]
    peers = [*one_per_name(known), Peer("SageAttention2 recipe, simulated", "end to end", simulated)]
    run: dict[str, Any] = {
        "environment": environment(),
        "clocks_before": clocks(),
        "sizes": {"batch": 1, "heads": args.heads, "seqlen": args.seqlen, "dtype": "bfloat16"},
        "measured_before": SAGE2_MEASURED,
        "points": [],
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    masks = {"no": [False], "yes": [True], "both": [False, True]}[args.causal]
    for head_dim in args.head_dim:
        for causal in masks:
            for name in args.distributions:
                sizes = {"heads": args.heads, "seqlen": args.seqlen, "head_dim": head_dim, "device": device}
                run["points"] += run_problem(peers, name, sizes, causal)
    shown = run["points"] + bar_points(args.seqlen)
    for head_dim in args.head_dim:
        for causal in masks:
            for metric in METRICS:
                sys.stdout.write(table(shown, metric, head_dim, causal))
    for name, reason in dict.fromkeys((p["name"], p["unavailable"]) for p in run["points"] if "unavailable" in p):
        sys.stdout.write(f"left out: {name}: {reason}\n")
    path = args.out or default_path("accuracy", run)
    write_json(path, run)
    sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
