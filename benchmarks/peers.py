# SPDX-License-Identifier: Apache-2.0
"""The contenders: sagert and whichever other attention packages are installed.

A peer is a function `(q, k, v, causal) -> (call, output)` over bfloat16 ``[B, H, S, D]`` tensors: `call` launches what
is timed, `output` gives the latest result as ``[B, H, S, D]`` for the check of numerics. It raises Unavailable with a
reason.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from native_call import NativeCall
from timing import Call
from torch.nn.attention import SDPBackend, sdpa_kernel

import sagert

Output = Callable[[], torch.Tensor]
Prepared = tuple[Call, Output]
Prepare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], Prepared]


class Unavailable(Exception):
    """The peer is not installed or does not do this problem."""


@dataclass(frozen=True)
class Peer:
    """A contender of the table."""

    name: str
    timed: str  # "kernel": inputs already quantized; "end to end": from bfloat16 to the output
    prepare: Prepare


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error


def returned(run: Callable[[], Any]) -> Prepared:
    """A call whose output is what it returns (or the first thing it returns)."""
    latest: list[torch.Tensor] = []

    def call() -> None:
        out = run()
        latest[:] = [out[0] if isinstance(out, tuple) else out]

    def output() -> torch.Tensor:
        call()
        return latest[0]

    return call, output


def written(run: Callable[[], Any], out: torch.Tensor, scale: float = 1.0) -> Prepared:
    """A call that writes `out`, which is poisoned first so that a kernel that does nothing cannot pass."""

    def output() -> torch.Tensor:
        # NaN in e4m3, and in fp16 and bf16
        (out.view(torch.uint8).fill_(0x7F) if out.element_size() == 1 else out.view(torch.int16).fill_(0x7FFF))
        run()
        return out.float() * scale

    return run, output


def sagert_end_to_end(precision: str) -> Prepare:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        out = torch.empty_like(q)
        gqa = q.shape[1] != k.shape[1]

        def run() -> None:
            sagert.attention(q, k, v, is_causal=causal, enable_gqa=gqa, precision=precision, out=out)

        return written(run, out)

    return prepare


def sagert_kernel(precision: str) -> Prepare:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        out = torch.empty_like(q)
        split = NativeCall(q, k, v, out, causal=causal, precision=precision)
        split.quantize()
        return written(split.attend, out)

    return prepare


def row_end_to_end(row: str) -> Prepare:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        out = torch.empty_like(q)
        return written(NativeCall(q, k, v, out, causal=causal, precision=precision_of(row), row=row).run, out)

    return prepare


def row_kernel(row: str) -> Prepare:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        out = torch.empty_like(q)
        split = NativeCall(q, k, v, out, causal=causal, precision=precision_of(row), row=row)
        split.quantize()
        return written(split.attend, out)

    return prepare


def precision_of(row: str) -> str:
    """ValueError with the rows there are where `row` is none of them."""
    known = {r.id: r.precision for r in sagert.kernels()}
    if row not in known:
        raise ValueError(f"row {row!r}; this sagert has: {', '.join(known)}")
    return known[row]


def sdpa(backend: SDPBackend) -> Prepare:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        def run() -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return returned(run)

    return prepare


def flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    flash = module("flash_attn_interface")
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    call, output = returned(lambda: flash.flash_attn_func(q, k, v, causal=causal))
    return call, lambda: output().transpose(1, 2)


def flash_attention_3_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    flash = module("flash_attn_interface")
    batch, heads_kv = k.shape[:2]
    (q8, dq), (k8, dk), (v8, dv) = (to_fp8(t.transpose(1, 2).contiguous()) for t in (q, k, v))
    dq, dk, dv = (d.expand(batch, heads_kv).contiguous() for d in (dq, dk, dv))
    call, output = returned(
        lambda: flash.flash_attn_func(q8, k8, v8, causal=causal, q_descale=dq, k_descale=dk, v_descale=dv)
    )
    return call, lambda: output().transpose(1, 2)


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` as e4m3 with one scale for the tensor, and that scale as float32 ``[1]``."""
    scale = (x.abs().amax().float() / 448.0).reshape(1)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def cudnn_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    """cuDNN's FP8 forward through its graph interface, e4m3 in and out, one scale per tensor."""
    cudnn = module("cudnn")
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.FP8_E4M3,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    tensors, scales = zip(*(to_fp8(t) for t in (q, k, v)), strict=True)
    out_scale = 1.0 / float(scales[2])  # V's own: no output is larger than V's largest value
    one = torch.ones(1, device=q.device)
    scalars = [*scales, one, one, one * out_scale]  # descale q, k, v, s; scale s, o
    inputs = [
        graph.tensor(dim=list(t.shape), stride=list(t.stride()), data_type=cudnn.data_type.FP8_E4M3) for t in tensors
    ] + [graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=cudnn.data_type.FLOAT) for _ in scalars]
    options = {"attn_scale": 1.0 / math.sqrt(q.shape[-1]), "use_causal_mask": causal}
    try:
        o, _, amax_s, amax_o = graph.sdpa_fp8(*inputs, generate_stats=False, **options)
    except TypeError:  # before that argument existed
        o, _, amax_s, amax_o = graph.sdpa_fp8(*inputs, is_inference=True, **options)
    o.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(cudnn.data_type.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
    pack = dict(zip(inputs, [*tensors, *(s.view(1, 1, 1, 1) for s in scalars)], strict=True))
    pack |= {o: out, amax_s: torch.empty(1, 1, 1, 1, device=q.device), amax_o: torch.empty(1, 1, 1, 1, device=q.device)}
    return written(lambda: graph.execute(pack, workspace, handle=handle), out, 1.0 / out_scale)


def sageattention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    sage = module("sageattention")
    return returned(lambda: sage.sageattn(q, k, v, tensor_layout="HND", is_causal=causal))


def sageattention_int8_fp16(accumulator: str) -> Prepare:
    """SageAttention2's kernel for compute capability 8.0 with its defaults: per-thread scales, mean of K subtracted."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        sage = module("sageattention")
        options = {"tensor_layout": "HND", "is_causal": causal, "pv_accum_dtype": accumulator}
        return returned(lambda: sage.sageattn_qk_int8_pv_fp16_cuda(q, k, v, **options))

    return prepare


def sageattention_int8_fp16_kernel(accumulator: str) -> Prepare:
    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
        core = module("sageattention.core")
        name = {"fp32": "qk_int8_sv_f16_accum_f32_attn", "fp16+fp32": "qk_int8_sv_f16_accum_f16_attn_inst_buf"}
        attend = getattr(core.sm80_compile, name[accumulator])
        rows = 16 if q.shape[-1] == 128 and accumulator == "fp16+fp32" else 32  # of a warp: what shares Q's scales
        blocks = {"BLKQ": 128, "WARPQ": rows, "BLKK": 64, "WARPK": 64}
        mean = k.mean(dim=2, keepdim=True)
        q8, q_scale, k8, k_scale = core.per_thread_int8_triton(q, k, mean, tensor_layout="HND", **blocks)
        v16, out = v.to(torch.float16), torch.empty_like(q)
        # 1: [B, H, S, D]; 3: per-thread scales; 0: no LSE
        tail = (1, int(causal), 3, q.shape[-1] ** -0.5, 0)
        return written(lambda: attend(q8, k8, v16, out, q_scale, k_scale, *tail), out)

    return prepare


def comfy_kitchen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    kitchen = module("comfy_kitchen")
    if causal:
        raise Unavailable("has no causal mask of its own")
    return returned(lambda: kitchen.int8_attention(q, k, v))


def comfy_kitchen_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Prepared:
    kitchen = module("comfy_kitchen")
    if causal:
        raise Unavailable("has no causal mask of its own")
    packed = kitchen.prequantize_int8_attention(q, k, v)
    return returned(lambda: kitchen.int8_attention_from_prequantized(packed))


def contenders(precisions: list[str], rows: list[str] | None = None) -> list[Peer]:
    """sagert's precisions (or the named rows), kernel only and end to end, and every peer this script knows."""
    if rows:
        mine = [Peer(f"sagert {row}", "kernel", row_kernel(row)) for row in rows]
        mine += [Peer(f"sagert {row}", "end to end", row_end_to_end(row)) for row in rows]
    else:
        mine = [Peer(f"sagert {p}", "kernel", sagert_kernel(p)) for p in precisions]
        mine += [Peer(f"sagert {p}", "end to end", sagert_end_to_end(p)) for p in precisions]
    sage = [
        Peer(f"SageAttention int8_fp16 ({accumulator})", timed, prepare(accumulator))
        for accumulator in ("fp32", "fp16+fp32")
        for timed, prepare in (("kernel", sageattention_int8_fp16_kernel), ("end to end", sageattention_int8_fp16))
    ]
    return [
        *mine,
        Peer("SDPA flash bf16", "end to end", sdpa(SDPBackend.FLASH_ATTENTION)),
        Peer("SDPA cuDNN bf16", "end to end", sdpa(SDPBackend.CUDNN_ATTENTION)),
        Peer("FlashAttention-3 bf16", "end to end", flash_attention_3),
        Peer("FlashAttention-3 fp8", "kernel", flash_attention_3_fp8),
        Peer("cuDNN fp8", "kernel", cudnn_fp8),
        Peer("SageAttention", "end to end", sageattention),
        *sage,
        Peer("comfy-kitchen int8", "kernel", comfy_kitchen_kernel),
        Peer("comfy-kitchen int8", "end to end", comfy_kitchen),
    ]
