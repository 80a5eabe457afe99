# SPDX-License-Identifier: Apache-2.0
"""attention_varlen(): attention of sequences of different lengths, packed one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sagert import checks, ops, sdpa
from sagert import fallback as fallback_module
from sagert.calls import autocast, differentiated, obstacles, precision_of, refuse
from sagert.options import Options
from sagert.plans import PLANS, tensor_key
from sagert.visibility import pattern

Window = tuple[int | None, int | None]


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, precision: str = ...,
    return_lse: Literal[False] = ..., out: Tensor | None = ..., smooth_k: bool = ..., fallback: str = ...,
    causal_alignment: str = ..., window: Window | None = ..., validate: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, precision: str = ...,
    return_lse: Literal[True], out: Tensor | None = ..., smooth_k: bool = ..., fallback: str = ...,
    causal_alignment: str = ..., window: Window | None = ..., validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    precision: str = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
    smooth_k: bool = True,
    fallback: str = "error",
    causal_alignment: str = "top_left",
    window: Window | None = None,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of N packed sequences, each with its own lengths of queries and keys.

    Args:
        q: queries [total_q, H, D], fp16, bf16 or fp32, any strides; sequence i has rows cu_seqlens_q[i] up to
            cu_seqlens_q[i + 1]. Never modified; nor are k and v.
        k: keys [total_k, Hk, D], of q's dtype and device.
        v: values [total_k, Hk, Dv].
        cu_seqlens_q: int32 [N + 1] on q's device, from 0 to total_q, not descending; equal neighbours are an empty
            sequence.
        cu_seqlens_k: the same for keys. A sequence without keys gives 0 and an LSE of -inf.
        max_seqlen_q: length of the longest sequence of queries, or more; it sizes the launch. Too small a value leaves
            queries out, unnoticed unless `validate`.
        max_seqlen_k: the same for keys.
        is_causal, scale, enable_gqa, precision, smooth_k, causal_alignment, window: as in `attention`, per sequence.
        return_lse: also return the log-sum-exp, fp32 [H, total_q].
        out: tensor to write into, [total_q, H, Dv].
        fallback: as in `attention`; SDPA then runs sequence by sequence, which waits for the GPU to read the lengths.
        validate: read cu_seqlens back and check them, which waits for the GPU. Without it nothing does, and what
            malformed ones give is undefined.

    Returns:
        The result [total_q, H, Dv] in q's dtype and memory order, or (result, lse). Raises as `attention` does.
    """
    key: Any = None
    if not validate and not torch.compiler.is_compiling():
        try:  # as in attention()
            key = (
                *map(tensor_key, (q, k, v, cu_seqlens_q, cu_seqlens_k)), max_seqlen_q, max_seqlen_k, is_causal, scale,
                enable_gqa, precision, return_lse, smooth_k, fallback, causal_alignment, window,
                None if out is None else tensor_key(out),
            )  # fmt: skip
            plan = PLANS.by_key.get(key)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            key = plan = None
        if plan is not None:
            given = (q, k, v, cu_seqlens_q, cu_seqlens_k)
            if ops.is_plain(given if out is None else (*given, out), plan.half):
                return plan.launch(given, out)  # type: ignore[no-any-return]

    q, k, v = autocast(q, q, k, v)
    checks.check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, enable_gqa)
    scale = checks.check_scale(scale, q.shape[2])
    code = precision_of(precision)
    seen = pattern(is_causal, window, causal_alignment)
    may_fall_back = fallback_module.use_sdpa(fallback)
    if validate:
        checks.validate_segments("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        checks.validate_segments("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if not (cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()):
        cu_seqlens_q, cu_seqlens_k, key = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None
    if out is not None:
        inputs = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        checks.check_out(out, (q.shape[0], q.shape[1], v.shape[2]), q, inputs, checks.PACKED)

    grad = differentiated(q, k, v)
    asked = obstacles(0.0, grad)
    if asked:
        exact = None
        if may_fall_back and not return_lse and not (grad and out is not None):
            exact = partial(sdpa.attention_varlen, q, k, v, cu_seqlens_q, cu_seqlens_k, seen, scale)

        def explain() -> Any:
            from sagert.registry import explain

            n = cu_seqlens_q.shape[0] - 1
            return explain(
                (n, q.shape[1], max_seqlen_q, q.shape[2]), (n, k.shape[1], max_seqlen_k, k.shape[2]),
                (n, v.shape[1], max_seqlen_k, v.shape[2]), dtype=q.dtype, precision=precision, return_lse=return_lse,
                smooth_k=smooth_k, is_causal=is_causal, causal_alignment=causal_alignment, window=window, varlen=True,
                requires_grad=grad, device=q.device.index,
            )  # fmt: skip

        result = refuse(asked, exact, explain if q.device.type == "cuda" else None)
        return result if out is None else out.copy_(result)
    options = Options(
        scale, seen.is_causal, code, bool(smooth_k), bool(return_lse), may_fall_back, seen.window_left,
        seen.window_right, seen.bottom_right,
    )  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    result, lse = ops.call("attention_varlen", out, q, k, v, *lengths, *options, keep=ops.keep(key))
    return (result, lse) if return_lse else result  # type: ignore[return-value]
