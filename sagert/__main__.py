# SPDX-License-Identifier: Apache-2.0
"""Command line: python -m sagert {doctor, explain, list, verify}."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sagert.codes import PRECISIONS
from sagert.errors import SagertError


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def _json(data: Any) -> None:
    _write(json.dumps(data, indent=2))


def _doctor(options: argparse.Namespace) -> int:
    from sagert.doctor import collect, render

    report = collect(selftest=options.selftest)
    if options.json:
        _json(report)
    else:
        _write(render(report))
    return 0 if report["usable"] else 1


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,S,D: write four numbers such as 1,32,4096,128")
    return shape


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,RIGHT: write two numbers such as 1024,0") from None
    return left, right


def _explain(options: argparse.Namespace) -> int:
    from sagert.registry import Device, explain, parse_capability, parse_driver

    batch, heads, seqlen, dim = options.shape
    heads_kv = heads if options.kv_heads is None else options.kv_heads
    seqlen_k = seqlen if options.sk is None else options.sk
    device = None
    if options.device_capability is not None:
        device = Device(parse_capability(options.device_capability), parse_driver(options.driver))
    answer = explain(
        (batch, heads, seqlen, dim),
        (batch, heads_kv, seqlen_k, dim),
        (batch, heads_kv, seqlen_k, dim if options.dv is None else options.dv),
        attn_mask=options.mask,
        is_causal=options.causal,
        precision=options.precision,
        return_lse=options.lse,
        smooth_k=not options.no_smooth_k,
        causal_alignment="bottom_right" if options.bottom_right else "top_left",
        window=options.window,
        varlen=options.varlen,
        dtype=options.dtype,
        device=device,
    )
    if options.json:
        _json(asdict(answer))
    else:
        _write(str(answer))
    return 0 if answer else 1


def _list(options: argparse.Namespace) -> int:
    from sagert.registry import kernels

    rows = kernels()
    if options.json:
        _json([asdict(row) for row in rows])
        return 0
    for row in rows:
        low, high = (".".join(map(str, pair)) for pair in (row.capability_min, row.capability_max))
        where = low if low == high else f"{low}-{high}"
        driver = ".".join(map(str, row.driver_min))
        _write(
            f"{row.id}: {row.precision}, capability {where}, driver {driver} or later, head_dim <= {row.head_dim_max}, "
            f"{'/'.join(row.dtypes)}, accuracy {row.accuracy} ({row.relative_l1}), serves {', '.join(row.flags) or '-'}"
        )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from sagert.verify import verify

    result = verify()
    if options.json:
        _json(result)
    else:
        for name, problem in result["bundles"].items():
            _write(f"bundle {name}: {problem or 'ok'}")
        record = result["record"]
        _write(f"installed files: {record['checked']} checked, {len(record['problems'])} wrong")
        for problem in record["problems"]:
            _write(f"  {problem}")
        _write("ok" if result["ok"] else "FAILED: reinstall sagert")
    return 0 if result["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sagert", description="Quantized attention for NVIDIA GPUs: what this installation holds and can run."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(function=function)
        return sub

    doctor = command(
        "doctor", _doctor, "say what runs on this machine and why the rest does not; exit 1 if nothing does"
    )
    doctor.add_argument("--selftest", action="store_true", help="run every usable row and compare with exact attention")

    explain = command(
        "explain", _explain, "say which kernel row serves a call, or every row's reasons; exit 1 if none does"
    )
    explain.add_argument("--shape", type=_shape, required=True, metavar="B,H,S,D", help="shape of the queries")
    explain.add_argument("--kv-heads", type=int, metavar="N", help="heads of K and V (default: H)")
    explain.add_argument("--sk", type=int, metavar="N", help="number of keys (default: S)")
    explain.add_argument("--dtype", default="bf16", help="bf16 (default), fp16 or fp32")
    explain.add_argument("--precision", default="auto", choices=tuple(PRECISIONS), help="default: auto")
    explain.add_argument("--causal", action="store_true", help="query i sees keys 0 .. i")
    explain.add_argument("--dv", type=int, metavar="N", help="head dim of V (default: D)")
    explain.add_argument(
        "--mask", nargs="?", const="bool", choices=("bool", "fp16", "bf16", "fp32"), help="with an attn_mask (bool)"
    )
    explain.add_argument("--window", type=_window, metavar="LEFT,RIGHT", help="with a sliding window; -1: unbounded")
    explain.add_argument("--bottom-right", action="store_true", help="causality and window aligned at the bottom right")
    explain.add_argument("--varlen", action="store_true", help="packed sequences: B of them, S and --sk the longest")
    explain.add_argument("--lse", action="store_true", help="with the log-sum-exp")
    explain.add_argument("--no-smooth-k", action="store_true", help="without subtracting K's mean")
    explain.add_argument("--device-capability", metavar="X.Y", help="such as 9.0; default: this machine's device")
    explain.add_argument("--driver", default="12.9", metavar="X.Y", help="its driver's CUDA version (default: 12.9)")

    command("list", _list, "list the kernel rows of this installation")
    command("verify", _verify, "check the sha256 of every kernel and installed file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 yes, 1 no, 2 a malformed call."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.function(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit's flush does not fail too
        return 0
    except SagertError as error:
        sys.stderr.write(f"sagert: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
