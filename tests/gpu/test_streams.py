# SPDX-License-Identifier: Apache-2.0
"""Streams, CUDA graphs, threads and repeatability."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sagert

FIRST_CALL = """
import torch, sagert
q, k, v = (torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.float16) for _ in range(3))
out = torch.full_like(q, float("nan"))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    sagert.attention(q, k, v, precision="{precision}", out=out)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out, sagert.attention(q, k, v, precision="{precision}")), "replay differs from an eager call"
"""


def tensors(device: torch.device, *, seed: int = 0, length: int = 513) -> list[torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (2, 4, length, 64)
    return [torch.randn(size, generator=generator, device=device).to(torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_graph_replay_equals_eager(causal: bool, served: list[str], device: torch.device) -> None:
    for precision in served:
        q, k, v = tensors(device)
        out = torch.full_like(q, float("nan"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = sagert.attention(q, k, v, is_causal=causal, precision=precision, return_lse=True, out=out)
        for seed in (1, 2, 3):
            for target, source in zip((q, k, v), tensors(device, seed=seed), strict=True):
                target.copy_(source)
            out.fill_(float("nan"))
            graph.replay()
            want, want_lse = sagert.attention(q, k, v, is_causal=causal, precision=precision, return_lse=True)
            assert torch.equal(out, want), f"{precision}: replay {seed} differs from eager"
            assert torch.equal(lse, want_lse), f"{precision}: LSE of replay {seed} differs from eager"


def test_graph_capture_as_the_first_call_of_a_process(served: list[str], tmp_path: Path) -> None:
    for precision in served:
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL.format(precision=precision)],
            cwd=tmp_path,  # not the clone, whose sagert has no library
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{precision}: {done.stderr[-2000:]}"


def test_side_stream(served: list[str], device: torch.device) -> None:
    """The call is ordered on the current stream: inputs still being written there are waited for, nothing else is."""
    big = torch.randn(4096, 4096, device=device)
    for precision in served:
        source = tensors(device, seed=5)
        want = sagert.attention(*source, precision=precision)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            late = [torch.zeros_like(t) for t in source]
            for _ in range(20):
                big @ big
            for target, values in zip(late, source, strict=True):
                target.copy_(values)
            got = sagert.attention(*late, precision=precision)
            assert torch.cuda.current_stream(device) == stream
        stream.synchronize()
        assert torch.equal(got, want), precision


def _ready(call: Callable[[], None], captured: bool) -> Callable[[], None]:
    """The call, or the replay of a graph of it; it has run once."""
    call()
    if not captured:
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _write_and_call(
    inputs: list[torch.Tensor], sources: list[list[torch.Tensor]], found: list[torch.Tensor], precision: str
) -> None:
    for target, source in zip(inputs, sources[0], strict=True):
        target.zero_()
        target.copy_(source)  # by the copy engine
    sagert.attention(*inputs, precision=precision, is_causal=True, out=found[0])
    for target, source in zip(inputs, sources[1], strict=True):
        torch.mul(source, 1, out=target)  # by a kernel, of which the call before must not see anything
    sagert.attention(*inputs, precision=precision, is_causal=True, out=found[1])


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_inputs_written_right_before(captured: bool, served: list[str], device: torch.device) -> None:
    """A call may start while what is in front of it ends: kernels, copies, and calls that use the same workspace."""
    for precision in served:
        sources = [tensors(device, seed=seed, length=2048) for seed in (1, 2)]
        want = [sagert.attention(*source, precision=precision, is_causal=True) for source in sources]
        inputs, found = ([torch.empty_like(t) for t in like] for like in (sources[0], want))
        run = _ready(partial(_write_and_call, inputs, sources, found, precision), captured)
        for _ in range(10):
            for tensor in (*inputs, *found):
                tensor.fill_(float("nan"))
            run()
            assert torch.equal(found[0], want[0]), precision
            assert torch.equal(found[1], want[1]), precision


def _write_on_streams_and_call(
    inputs: list[torch.Tensor], source: list[torch.Tensor], out: torch.Tensor, precision: str, work: torch.Tensor
) -> None:
    """Q, K and V each come from a stream of its own, that of V late; their events are all the call waits for."""
    current = torch.cuda.current_stream()
    streams = [current, torch.cuda.Stream(), torch.cuda.Stream()]
    for stream, target, values in zip(streams, inputs, source, strict=True):
        if stream is not current:
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if target is inputs[2]:
                for _ in range(20):
                    work @ work
            target.copy_(values) if target is inputs[1] else torch.mul(values, 1, out=target)
    for stream in streams[1:]:
        current.wait_stream(stream)
    sagert.attention(*inputs, precision=precision, out=out)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_inputs_from_other_streams(captured: bool, served: list[str], device: torch.device) -> None:
    """A call that may start early still waits for every event in front of it."""
    work = torch.randn(4096, 4096, device=device)
    for precision in served:
        source = tensors(device, seed=7, length=1024)
        want = sagert.attention(*source, precision=precision)
        inputs, out = [torch.empty_like(t) for t in source], torch.empty_like(want)
        run = _ready(partial(_write_on_streams_and_call, inputs, source, out, precision, work), captured)
        for _ in range(3):
            for tensor in (*inputs, out):
                tensor.fill_(float("nan"))
            run()
            assert torch.equal(out, want), precision


def test_same_bits_every_time(served: list[str], device: torch.device) -> None:
    for precision in served:
        q, k, v = tensors(device, length=1500)
        want, want_lse = sagert.attention(q, k, v, precision=precision, return_lse=True)
        for _ in range(20):
            got, lse = sagert.attention(q, k, v, precision=precision, return_lse=True)
            assert torch.equal(got, want), precision
            assert torch.equal(lse, want_lse), precision


def test_repeated_calls_hold_no_memory(served: list[str], device: torch.device) -> None:
    for precision in served:
        q, k, v = tensors(device)
        for _ in range(2):
            sagert.attention(q, k, v, precision=precision)
        held = torch.cuda.memory_allocated(device)
        for _ in range(20):
            sagert.attention(q, k, v, precision=precision)
        assert torch.cuda.memory_allocated(device) == held, precision


def test_quantizing_again(here: list[Any], device: torch.device) -> None:
    """The second call of a shape and those after it only launch; other tensors are other bits."""
    for precision in dict.fromkeys(row.precision for row in here if "quantized_kv" in row.flags):
        for seed in (0, 1, 0):
            q, k, v = tensors(device, seed=seed)
            kv = sagert.quantize_kv(k, v, precision=precision)
            want = sagert.attention(q, k, v, precision=kv.precision)
            assert torch.equal(sagert.attention(q, kv), want), (precision, seed)


def test_a_call_after_autocast(served: list[str], device: torch.device) -> None:
    """Under autocast fp32 tensors are cast; the same tensors without it are computed as fp32 again."""
    for precision in served:
        q, k, v = (t.float() for t in tensors(device))
        with torch.autocast("cuda", torch.bfloat16):
            cast = sagert.attention(q, k, v, precision=precision)
        got = sagert.attention(q, k, v, precision=precision)
        assert (cast.dtype, got.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(got.bfloat16(), cast), precision


def test_threads(served: list[str], device: torch.device) -> None:
    precision = served[0]
    want = [sagert.attention(*tensors(device, seed=s), precision=precision) for s in range(4)]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(device)):
                inputs = tensors(device, seed=seed)
                for turn in range(10):
                    got = sagert.attention(*inputs, precision=precision)
                    torch.cuda.current_stream(device).synchronize()
                    if not torch.equal(got, want[seed]):
                        failures.append(f"thread {seed}, call {turn}: other bits")
        except Exception as error:
            failures.append(f"thread {seed}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_second_device(served: list[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    current = torch.cuda.current_device()
    other = torch.device("cuda", 1 - current if current < 2 else 0)
    for precision in served:
        want = sagert.attention(*tensors(torch.device("cuda", current)), precision=precision)
        got = sagert.attention(*[t.to(other) for t in tensors(torch.device("cuda", current))], precision=precision)
        assert torch.cuda.current_device() == current
        assert torch.equal(got.to(want.device), want), precision


def test_auto_and_compile(served: list[str], device: torch.device) -> None:
    q, k, v = tensors(device)
    compiled = torch.compile(lambda a, b, c: sagert.attention(a, b, c, is_causal=True), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), sagert.attention(q, k, v, is_causal=True))


def test_refusals_launch_nothing(device: torch.device) -> None:
    q = torch.randn(1, 2, 64, 264, device=device, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="head_dim"):
        sagert.attention(q, q, q, precision="int8_fp8")
    small = torch.randn(1, 2, 64, 64, device=device, dtype=torch.float16)
    with pytest.raises(NotImplementedError):
        sagert.attention(small, small, small, dropout_p=0.1)
    with pytest.raises(NotImplementedError):
        sagert.attention(small.requires_grad_(), small, small)
