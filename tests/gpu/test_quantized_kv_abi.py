# SPDX-License-Identifier: Apache-2.0
"""K and V quantized once through the C ABI: the same bits as the one call, for every row of this GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_kit import Case, cases, place

from sagert import codes, native


@pytest.fixture(scope="module")
def abi() -> ModuleType:
    """tests/kit/abi.py, by path: the tests' folders need not be importable here."""
    path = Path(__file__).resolve().parents[1] / "kit" / "abi.py"
    spec = importlib.util.spec_from_file_location("sagert_test_abi", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Caller:
    """Calls of the C ABI on tensors [B, H, S, D]; every buffer is full of 0xff before it is used."""

    def __init__(self, abi: ModuleType) -> None:
        self.abi = abi
        self.library = abi.Library(native.library_path())

    def arguments(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, precision: str, flags: int) -> Any:
        tensors = {name: [x.data_ptr(), list(x.stride())] for name, x in (("q", q), ("k", k), ("v", v))}
        b, h, s, d = q.shape
        return self.abi.attention_args(
            **tensors, batch=b, heads_q=h, heads_kv=k.shape[1], seqlen_q=s, seqlen_k=k.shape[2], head_dim=d,
            dtype=codes.dtype_code(q.dtype), precision=codes.precision_code(precision),
            flags=flags, scale=d**-0.5, stream=torch.cuda.current_stream().cuda_stream, device=q.device.index or 0,
        )  # fmt: skip

    def buffer(self, size: int, device: torch.device) -> torch.Tensor:
        return torch.full((max(size, 1),), 255, dtype=torch.uint8, device=device)

    def check(self, status: int) -> None:
        if status != self.abi.OK:
            raise AssertionError(self.library.error())

    def attention(self, args: Any, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:3], float("nan"), dtype=torch.float32, device=q.device)
        args.out.data, args.lse = out.data_ptr(), lse.data_ptr()
        for axis in range(4):
            args.out.stride[axis] = out.stride(axis)
        status, size = self.library.workspace_size(args)
        self.check(status)
        workspace = self.buffer(size, q.device)
        args.workspace, args.workspace_size = workspace.data_ptr(), size
        self.check(self.library.attention(args))
        torch.cuda.synchronize()
        return out, lse


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("case", [case for case in cases() if case.index % 11 == 3], ids=str)
def test_the_same_bits_as_the_one_call(abi: ModuleType, case: Case, here: list[Any], device: torch.device) -> None:
    """One buffer of quantized K and V serves full and causal attention of other queries; K is gone by then."""
    caller = Caller(abi)
    generator = torch.Generator(device=device).manual_seed(case.index)

    def draw(heads: int, length: int) -> torch.Tensor:
        size = (case.batch, heads, length, case.head_dim)
        return torch.randn(size, generator=generator, device=device).to(case.dtype)

    q, more = draw(case.heads, case.seqlen_q), draw(2 * case.heads, 70)
    keys, values = draw(case.heads_kv, case.seqlen_k), draw(case.heads_kv, case.seqlen_k)
    for precision in dict.fromkeys(row.precision for row in here if "quantized_kv" in row.flags):
        k, v = (place(x, case.memory, 0.0)[0] for x in (keys, values))
        expected = [
            caller.attention(caller.arguments(x, k, v, precision, abi.LSE | causal), x)
            for x in (q, more)
            for causal in (0, abi.CAUSAL)
        ]
        args = caller.arguments(q, k, v, precision, abi.LSE)
        args.seqlen_q = 0  # must not matter
        status, info = caller.library.kv_plan(args)
        caller.check(status)
        kv = caller.buffer(info.bytes, device)
        args.kv, args.kv_size, args.row = kv.data_ptr(), info.bytes, info.row + 1
        caller.check(caller.library.attention(args, "sagert_quantize_kv"))
        torch.cuda.synchronize()
        k.fill_(float("nan"))
        if not info.reads_v:
            v.fill_(float("nan"))
        found = []
        for x in (q, more):
            for causal in (0, abi.CAUSAL):
                args = caller.arguments(x, k, v, precision, abi.LSE | abi.QUANTIZED_KV | causal)
                args.kv, args.kv_size, args.row, args.k.data = kv.data_ptr(), info.bytes, info.row + 1, None
                found.append(caller.attention(args, x))
        for (out, lse), (other_out, other_lse) in zip(found, expected, strict=True):
            assert same_bits(out, other_out), f"{precision}: other output"
            assert same_bits(lse, other_lse), f"{precision}: other LSE"
