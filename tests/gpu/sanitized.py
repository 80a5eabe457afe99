# SPDX-License-Identifier: Apache-2.0
"""Small problems for rows, each of their kernels once at least; test_sanitizers runs it under a tool.

argv: the ids of the rows. Prints each problem before it starts, so that a tool's report stands behind its problem.
No kernel of other libraries runs: inputs come from the host, and no memory is filled beforehand, which initcheck would
take for initialized.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from native_call import NativeCall

import sagert

HEADS, HEADS_KV, SEQLEN_Q, SEQLEN_K = 4, 2, 300, 700
LOUD = 50.0  # a value of V beside which its block's others are small


def problems(row: Any) -> list[dict[str, Any]]:
    """Every head dim and dtype, with and without a causal mask and an LSE; then the features."""
    axes = list(itertools.product(row.axes["head_dim"], (torch.float16, torch.bfloat16)))
    made = [
        {"head_dim": d, "dtype": dtype, "causal": causal, "lse": lse}
        for d, dtype in axes
        for causal, lse in itertools.product((False, True), (False, True))
    ]
    for feature in ("mask", "window"):
        if feature in row.flags:
            made += [{"head_dim": d, "dtype": t, "causal": False, "lse": False, feature: True} for d, t in axes]
    return made


def inputs(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V on the device; the second head of V holds a loud value and an infinity."""
    generator = torch.Generator().manual_seed(head_dim)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, head_dim, generator=generator)

    q, k, v = draw(HEADS, SEQLEN_Q), draw(HEADS_KV, SEQLEN_K), draw(HEADS_KV, SEQLEN_K)
    v[0, 1, 100] *= LOUD
    v[0, 1, 200, 3] = float("inf")
    return q.to(dtype).cuda(), k.to(dtype).cuda(), v.to(dtype).cuda()


def run(row: Any, head_dim: int, dtype: torch.dtype, causal: bool, lse: bool, **feature: bool) -> None:
    q, k, v = inputs(head_dim, dtype)
    out = torch.empty_like(q)
    statistic = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse else None
    seen = torch.rand(SEQLEN_Q, SEQLEN_K, generator=torch.Generator().manual_seed(1)) < 0.5
    NativeCall(
        q, k, v, out,
        precision=row.precision, row=row.id, causal=causal, lse=statistic, poison=False,
        mask=seen.cuda() if feature.get("mask") else None,
        window=(60, 10) if feature.get("window") else None,
    ).run()  # fmt: skip
    torch.cuda.synchronize()
    group = HEADS // HEADS_KV
    if not torch.isfinite(out.cpu()[:, :group]).all():
        raise AssertionError(f"{row.id}: not finite")
    if statistic is not None and not torch.isfinite(statistic.cpu()).all():
        raise AssertionError(f"{row.id}: the LSE is not finite")


def main() -> int:
    rows = {row.id: row for row in sagert.kernels()}
    for row in map(rows.__getitem__, sys.argv[1:]):
        for given in problems(row):
            print(row.id, given, flush=True)
            run(row, **given)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
