# SPDX-License-Identifier: Apache-2.0
"""The kernels' arithmetic in plain torch: what CPU tensors run on, and the oracle of the tests.

Same steps, same rounding and same order over key blocks as the kernels, in fp32; it differs from them only by the order
of additions inside a matrix product and by the last bit of exp2. exact_attention is float64 attention without any
quantization, which accuracy is measured against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sagert.quantize import (
    first_nonfinite,
    k_shift,
    quantize_key_groups,
    quantize_rows,
    quantize_v_fp8,
    quantize_v_int8,
    v_mean,
)

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
LOG2_448 = math.log2(448.0)  # 448 is e4m3's largest value
WGMMA_LOG2_P_SCALE = 8.0  # of P in 16 bits: keeps small weights out of fp16's subnormal numbers
PRECISIONS = ("int8_fp16", "int8_fp8")  # of the portable family, which CPU tensors run on
RECIPES = {"portable": PRECISIONS, "wgmma": ("int8_fp16", "int8_fp8", "int8_int8")}
CHUNK_ELEMENTS = 1 << 24  # scores held at a time: 64 MiB in fp32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    precision: str = "int8_fp16",
    smooth_k: bool = True,
    block_n: int = 128,
    family: str = "portable",
) -> tuple[Tensor, Tensor]:
    """Quantized attention.

    q [B, H, S, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], fp16 or bf16, any strides, H a multiple of Hk; block_n is the
    number of keys the online softmax takes at a time. `family` is whose recipe to follow: "portable" scales K by rows
    and visits keys upwards; "wgmma" scales K by groups of 32 keys, takes V's mean off where it is large, and visits
    keys downwards (K must be finite there); its int8_int8 scales P by the row maximum of each block of keys, and V by
    block and channel. Returns (out [B, H, S, Dv] in q's dtype, lse fp32 [B, H, S]).
    ValueError for a precision or a family that has no reference.
    """
    if precision not in RECIPES.get(family, ()):
        known = "; ".join(f"{name}: {', '.join(precisions)}" for name, precisions in RECIPES.items())
        raise ValueError(f"precision={precision!r} has no reference in family={family!r}: use one of {known}")
    b, h, s, d = q.shape
    hk, sk, dv = k.shape[1], k.shape[2], v.shape[3]
    out = torch.zeros(b, h, s, dv, dtype=q.dtype, device=q.device)
    lse = torch.full((b, h, s), -math.inf, dtype=torch.float32, device=q.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    if sk == 0:
        return out, lse
    scale = d**-0.5 if scale is None else scale
    group = h // hk
    rows = group * s
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # The query heads that share a key head are rows of one matrix.
        q_rows = q.reshape(b * hk, rows, d)
        k_rows = k.reshape(b * hk, sk, d)
        v_rows = v.reshape(b * hk, sk, dv)
        out_rows, lse_rows = out.view(b * hk, rows, dv), lse.view(b * hk, rows)
        position = torch.arange(s, device=q.device).repeat(group)
        heads = max(1, CHUNK_ELEMENTS // (max(rows, 1) * block_n))
        for first in range(0, b * hk, heads):
            part = slice(first, first + heads)
            o, z = _heads(
                q_rows[part], k_rows[part], v_rows[part], position, is_causal, scale, precision, smooth_k, block_n,
                family == "wgmma",
            )  # fmt: skip
            out_rows[part] = o.to(q.dtype)
            lse_rows[part] = z
    return out, lse


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    is_causal: bool,
    scale: float,
    precision: str,
    smooth_k: bool,
    block_n: int,
    wgmma: bool,
) -> tuple[Tensor, Tensor]:
    """Some key heads: q [N, rows, D], k [N, Sk, D], v [N, Sk, Dv]; fp32 out [N, rows, Dv] and lse [N, rows]."""
    fp8, integer = precision == "int8_fp8", precision == "int8_int8"
    kf, qf = k.float(), q.float() * torch.tensor(scale * LOG2E, dtype=torch.float32)
    shift = k_shift(kf) if smooth_k else kf.new_zeros(kf.shape[0], 1, kf.shape[2])
    k8, k_scale = quantize_key_groups(kf - shift) if wgmma else quantize_rows(kf - shift, math.inf)
    q8, q_scale = quantize_rows(qf, math.nan)
    k_scale = k_scale.transpose(1, 2)
    vf = v.float()
    first_pos, first_neg = first_nonfinite(vf)
    mean = v_mean(vf) if wgmma and precision != "int8_fp16" else None
    p_scale = LOG2_448 if fp8 else WGMMA_LOG2_P_SCALE if wgmma and not integer else 0.0
    if mean is not None:
        vf = vf - mean
    if fp8:
        pv, v_scale = quantize_v_fp8(vf)
    elif integer:
        pv, v_scale = quantize_v_int8(vf, block_n)
    else:
        pv, v_scale = torch.where(vf.isfinite(), vf, 0.0), vf.new_ones(1)

    sk = k.shape[1]
    m = qf.new_full((*q.shape[:2], 1), -math.inf)
    total = torch.zeros_like(m)
    acc = qf.new_zeros(*q.shape[:2], v.shape[2])
    end = min(sk, int(position.max()) + 1) if is_causal and position.numel() else sk
    starts = range(0, end, block_n)
    for start in reversed(starts) if wgmma else starts:
        keys = slice(start, min(start + block_n, sk))
        # Products of int8 values summed over D stay below 2**24: exact in fp32.
        scores = (q8 @ k8[:, keys].transpose(1, 2)) * k_scale[:, :, keys]
        if is_causal:
            hidden = torch.arange(start, keys.stop, device=q.device)[None, :] > position[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        highest = scores.amax(-1, keepdim=True) * q_scale
        m_new = torch.maximum(m, highest)
        base = torch.where(m_new == -math.inf, 0.0, m_new)  # every score so far is -inf: their weight is 0, not NaN
        alpha = torch.exp2(m - base)
        if integer:
            p = torch.exp2(scores * q_scale - torch.where(highest == -math.inf, 0.0, highest))
            p = torch.round(255.0 * p)
            weight = torch.exp2(highest - base) / 255.0
            block = start // block_n
            # Sums of products of bytes over a block stay below 2**24: exact in fp32.
            total = total * alpha + weight * p.sum(-1, keepdim=True)
            acc = acc * alpha + (p @ pv[:, keys]) * (weight * v_scale[:, block : block + 1])
        else:
            p = torch.exp2(scores * q_scale - (base - p_scale))
            total = total * alpha + p.sum(-1, keepdim=True)
            p = p.clamp(max=448.0).to(torch.float8_e4m3fn).float() if fp8 else p.to(v.dtype).float()
            acc = acc * alpha + p @ pv[:, keys]
        m = m_new
    out = acc / total
    if fp8:
        out = out * v_scale
    if mean is not None:
        out = out + mean
    # V's infinities and NaNs were left out of the products; each reaches exactly the rows that see its key.
    seen = (position.clamp(max=sk - 1) if is_causal else torch.full_like(position, sk - 1))[None, :, None]
    out = torch.where(first_pos <= seen, out + math.inf, out)
    out = torch.where(first_neg <= seen, out - math.inf, out)
    lse = m + torch.log2(total) - p_scale
    lse = lse + (qf * shift).sum(-1, keepdim=True)
    return out, (lse * LN2).squeeze(-1)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in float64 without quantization: (out [B, H, S, Dv], lse [B, H, S]), both float64.

    Shapes as for `attention`. A query that sees no key gives 0 and -inf; causal is top-left aligned.
    """
    b, h, s, d = q.shape
    sk, dv = k.shape[2], v.shape[3]
    group = h // max(k.shape[1], 1)
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, h, s, dv, dtype=torch.float64, device=q.device)
    lse = torch.full((b, h, s), -math.inf, dtype=torch.float64, device=q.device)
    if sk == 0:
        return out, lse
    step = max(1, CHUNK_ELEMENTS // (2 * max(sk, 1)))
    for i in range(b):
        for j in range(h):
            kd, vd = k[i, j // group].double(), v[i, j // group].double()
            for first in range(0, s, step):
                rows = slice(first, min(first + step, s))
                scores = (q[i, j, rows].double() @ kd.T) * scale
                visible = sk
                if is_causal:
                    visible = min(sk, rows.stop)
                    index = torch.arange(rows.start, rows.stop, device=q.device)
                    hidden = torch.arange(sk, device=q.device)[None, :] > index[:, None]
                    scores = scores.masked_fill(hidden, -math.inf)
                p = torch.softmax(scores, -1)
                bad = ~torch.isfinite(vd[:visible]).all(-1)
                value = p @ torch.where(torch.isfinite(vd), vd, 0.0)
                for key in bad.nonzero().flatten().tolist():  # a hidden key must not turn 0 * inf into NaN
                    sees = index >= key if is_causal else torch.ones(value.shape[0], dtype=torch.bool)
                    extra = torch.where(torch.isfinite(vd[key]), 0.0, vd[key])
                    value = torch.where(sees.to(value.device)[:, None], value + extra, value)
                out[i, j, rows] = value
                lse[i, j, rows] = torch.logsumexp(scores, -1)
    return out, lse


def error_metrics(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Cosine similarity, relative L1 (sum |a - e| / sum |e|) and root mean square error, computed in float64."""
    a, e = actual.double().flatten(), expected.double().flatten()
    norm = (a.norm() * e.norm()).item()
    total = e.abs().sum().item()
    difference = (a - e).abs().sum().item()
    return {
        "cosine": (a @ e).item() / norm if norm else 1.0,
        "relative_l1": difference / total if total else difference,
        "rmse": (a - e).square().mean().sqrt().item() if a.numel() else 0.0,
    }
