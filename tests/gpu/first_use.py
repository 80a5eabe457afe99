# SPDX-License-Identifier: Apache-2.0
"""A process whose first calls come from eight threads on two streams each; run by test_features_streams.

argv: precision, then "features" or "plain". Every thread asks for something else, all at once, so that kernels of
several rows load meanwhile.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

import sagert

THREADS, STREAMS, CALLS = 8, 2, 6
LENGTH = 300


def arguments(thread: int, stream: int, features: bool) -> tuple[list[torch.Tensor], dict[str, Any]]:
    generator = torch.Generator(device="cuda").manual_seed(10 * thread + stream)
    size = (1, 4, LENGTH + thread, 64 if thread % 2 else 128)
    tensors = [torch.randn(size, generator=generator, device="cuda").to(torch.bfloat16) for _ in range(3)]
    kind = thread % 4 if features else 0
    given: dict[str, Any] = {"is_causal": thread >= 4}
    if kind == 1:
        mask = torch.rand(size[2], size[2], generator=generator, device="cuda") < 0.7
        given["attn_mask"] = mask
    elif kind == 2:
        given["window"] = (60, 10)
    elif kind == 3:
        given["attn_mask"] = torch.randn(size[2], size[2], generator=generator, device="cuda")
    return tensors, given


def main() -> int:
    precision, features = sys.argv[1], sys.argv[2] == "features"
    inputs = {(t, s): arguments(t, s, features) for t in range(THREADS) for s in range(STREAMS)}
    torch.cuda.synchronize()
    start = threading.Barrier(THREADS)
    results: dict[tuple[int, int], list[torch.Tensor]] = {key: [] for key in inputs}
    failures: list[str] = []

    def work(thread: int) -> None:
        try:
            streams = [torch.cuda.Stream() for _ in range(STREAMS)]
            start.wait(timeout=60)
            for _ in range(CALLS):
                for number, stream in enumerate(streams):
                    tensors, given = inputs[thread, number]
                    with torch.cuda.stream(stream):
                        results[thread, number].append(sagert.attention(*tensors, precision=precision, **given))
            for stream in streams:
                stream.synchronize()
        except Exception as error:
            failures.append(f"thread {thread}: {error!r}")

    threads = [threading.Thread(target=work, args=(t,)) for t in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for key, (tensors, given) in inputs.items():
        want = sagert.attention(*tensors, precision=precision, **given)
        wrong = sum(not torch.equal(got, want) for got in results[key])
        if wrong or len(results[key]) != CALLS:
            failures.append(f"thread {key[0]}, stream {key[1]}: {wrong} of {len(results[key])} results have other bits")
    sys.stderr.write("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
