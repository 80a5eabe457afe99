# SPDX-License-Identifier: Apache-2.0
"""Runs the portable Triton kernels on CPU tensors, with the workspace and the arguments the host library gives them."""

import math

import attention as attention_kernels
import prepass
import torch
from triton import cdiv

BLOCK = 64
KEY_PAD = 128


PV_TYPES = {"fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8, "fp16": torch.float16}


def pv_of(precision: str, carrier: torch.dtype) -> str:
    """What P V multiplies, as the kernels' constant has it; `carrier` is what integers travel in."""
    integers = "i8" if carrier == torch.int8 else "fp16"
    return {"int8_fp16": "io", "int8_fp8": "fp8e4nv", "int8_int8": integers}[precision]


def _vec(x: torch.Tensor, padded: int) -> int:
    aligned = x.data_ptr() % 16 == 0 and x.stride(3) == 1
    return int(aligned and x.shape[3] == padded and all(s % 16 == 0 for s in x.stride()[:3]))


def _poisoned(shape, dtype: torch.dtype) -> torch.Tensor:
    """Memory that shows when a kernel reads what nothing wrote."""
    if dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def run(q, k, v, *, precision, causal=False, scale=None, smooth_k=True, tiles=(64, 64), carrier=torch.int8, out=None):
    """Attention through the kernels. q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, D]; returns (out, lse)."""
    b, h, s, d = q.shape
    hk, sk = k.shape[1:3]
    pv_type = pv_of(precision, carrier)
    fp8 = pv_type == "fp8e4nv"
    dp = 64 if d <= 64 else 128
    skp = max(cdiv(sk, KEY_PAD), 1) * KEY_PAD
    nb = b * hk
    scale = d**-0.5 if scale is None else scale
    parts = min(max(cdiv(sk, 512), 1), 32)
    part_rows = max(cdiv(cdiv(sk, parts), BLOCK) * BLOCK, BLOCK)
    parts = max(cdiv(sk, part_rows), 1)
    v_stats = 2 if fp8 else int(causal)

    k_sum, v_amax = _poisoned((nb, parts, dp), torch.float32), _poisoned((nb, parts, dp), torch.float32)
    v_bad, v_first = _poisoned((nb, parts, 2, dp), torch.int32), _poisoned((nb, 2, dp), torch.int32)
    k_bad, flags = _poisoned((nb, parts), torch.int32), _poisoned((nb,), torch.int32)
    cu = torch.zeros(2, dtype=torch.int32)  # not read
    k_shift, v_scale = _poisoned((nb, dp), torch.float32), _poisoned((nb, dp), torch.float32)
    k8, k_scale = _poisoned((nb, skp, dp), carrier), _poisoned((nb, skp), torch.float32)
    q8 = _poisoned((b * h, s, dp), carrier)
    q_scale, q_shift = _poisoned((b * h, s), torch.float32), _poisoned((b * h, s), torch.float32)
    copy_v = not fp8 and not _vec(v, dp)
    v_out = _poisoned((nb, dp, skp), torch.float8_e4m3fn) if fp8 else _poisoned((nb, skp, dp), v.dtype)
    if out is None:
        out = _poisoned((b, h, s, d), q.dtype)
    lse = _poisoned((b, h, s), torch.float32)

    kv_strides = (*k.stride(), *v.stride(), _vec(k, dp), _vec(v, dp))
    prepass.kv_stats[(nb * parts,)](
        k, v, k_sum, v_amax, v_bad, k_bad, cu, sk, hk, parts, part_rows, d, d, 0, *kv_strides,
        D=dp, BLOCK=BLOCK, V_STATS=v_stats,
    )  # fmt: skip
    prepass.quantize_kv[(nb * (skp // BLOCK),)](
        k, v, k_sum, v_amax, v_bad, k_bad, k_shift, k8, k_scale, v_out, v_scale, v_first, flags, cu,
        sk, skp, skp, hk, parts, d, d, int(smooth_k), int(copy_v), 0, 0, *kv_strides,
        D=dp, BLOCK=BLOCK, V_STATS=v_stats, PV=pv_type,
    )  # fmt: skip
    prepass.quantize_q[(b * h * cdiv(s, BLOCK),)](
        q, k_shift, q8, q_scale, q_shift, cu, scale * math.log2(math.e), s, s, h, h // hk, d, 0,
        *q.stride(), _vec(q, dp), int(smooth_k), D=dp, BLOCK=BLOCK,
    )  # fmt: skip
    if fp8:
        pv, v_strides = v_out, (hk * dp * skp, dp * skp, skp)
    elif copy_v:
        pv, v_strides = v_out, (hk * skp * dp, skp * dp, dp)
    else:
        pv, v_strides = v, v.stride()[:3]
    block_m, block_n = tiles
    attention_kernels.attention[(b * h * cdiv(s, block_m),)](
        q8, q_scale, q_shift, k8, k_scale, pv, v_scale, v_first, out, lse, s, sk, skp, h, h // hk, d,
        *v_strides, *out.stride(), _vec(out, dp), 1, int(smooth_k),
        D=dp, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=2, CAUSAL=causal, PV=pv_type,
    )  # fmt: skip
    return out, lse
