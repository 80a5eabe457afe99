# SPDX-License-Identifier: Apache-2.0
"""What a call costs on the host: one sagert.attention on a small CUDA tensor, its Python part, and the import."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from native_call import NativeCall
from report import RESULTS, environment, write_json

import sagert

IMPORT = "import time, torch; t = time.perf_counter(); import sagert; print((time.perf_counter() - t) * 1e3)"


def microseconds(call: Callable[[], object], calls: int, batches: int) -> float:
    """Median host time of one call over `batches` batches, the device idle before each batch.

    As many batches go before them unmeasured, while the processor's clock and torch's allocator settle.
    """
    samples = []
    for _ in range(2 * batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(samples[batches:])


def import_milliseconds() -> float:
    """Median time of `import sagert` after torch, each in a fresh process."""
    times = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    return statistics.median(times)


def feature_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, precision: str) -> dict[str, Callable[[], object]]:
    """Calls with a feature each, on inputs of [B, H, S, D]; the packed ones are the same tokens in B sequences."""
    batch, heads, length, dim = q.shape
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device)
    bias = torch.zeros(batch, 1, length, length, device=q.device)
    packed = [t.transpose(1, 2).reshape(batch * length, heads, dim) for t in (q, k, v)]
    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device)
    kept: list[Any] = []

    def over_quantized() -> object:
        if not kept:
            kept.append(sagert.quantize_kv(k, v, precision=precision))
        return sagert.attention(q, kept[0], precision=precision)

    return {
        "sagert.attention, bool mask": lambda: sagert.attention(q, k, v, mask, precision=precision),
        "sagert.attention, fp32 mask": lambda: sagert.attention(q, k, v, bias, precision=precision),
        "sagert.attention, causal, window": lambda: sagert.attention(
            q, k, v, is_causal=True, window=(64, 0), precision=precision
        ),
        "sagert.attention_varlen": lambda: sagert.attention_varlen(
            *packed, bounds, bounds, length, length, precision=precision
        ),
        "sagert.quantize_kv": lambda: sagert.quantize_kv(k, v, precision=precision),
        "sagert.attention, QuantizedKV": over_quantized,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="int8_fp8")
    parser.add_argument("--calls", type=int, default=50, help="per batch; few, so the launch queue never fills")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "host_cost.json")
    args = parser.parse_args()
    run: dict[str, Any] = {"import_ms": import_milliseconds()}
    sys.stdout.write(f"import sagert, torch already imported   {run['import_ms']:8.1f} ms\n")
    if not torch.cuda.is_available():
        sys.stderr.write("the cost of a call needs a CUDA device that torch can use\n")
        return 1

    q, k, v = (torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)
    native_call = NativeCall(q, k, v, out, causal=False, precision=args.precision)
    calls: dict[str, Callable[[], object]] = {
        "sagert.attention": lambda: sagert.attention(q, k, v, precision=args.precision),
        "sagert.attention, out= given": lambda: sagert.attention(q, k, v, precision=args.precision, out=out),
        "library only (launches included)": native_call.run,  # one call, its arguments ready
        "torch SDPA, for comparison": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    }
    for name, call in feature_calls(q, k, v, args.precision).items():
        try:
            call()
        except sagert.errors.UnsupportedError as refused:
            sys.stdout.write(f"{name}: {str(refused).splitlines()[0]}\n")
        else:
            calls[name] = call
    run |= {"environment": environment(), "shape": list(q.shape), "precision": args.precision}
    run["microseconds"] = {name: microseconds(call, args.calls, args.batches) for name, call in calls.items()}
    cost = run["microseconds"]
    cost["Python part (difference)"] = cost["sagert.attention"] - cost["library only (launches included)"]
    for name, value in cost.items():
        sys.stdout.write(f"{name:<40}{value:8.1f} us\n")
    write_json(args.out, run)
    sys.stdout.write(f"wrote {args.out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
