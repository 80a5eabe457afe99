# SPDX-License-Identifier: Apache-2.0
"""attention(): the public function, its defaults and its order of checks."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from sagert import checks, ops, sdpa
from sagert import fallback as fallback_module
from sagert.calls import autocast, differentiated, obstacles, precision_of, refuse
from sagert.kv import QuantizedKV
from sagert.options import Options
from sagert.plans import PLANS, tensor_key
from sagert.visibility import pattern

_is_compiling = torch.compiler.is_compiling
Window = tuple[int | None, int | None]


@overload
def attention(
    q: Tensor, k: Tensor | QuantizedKV, v: Tensor | None = ..., attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, layout: str = ...,
    precision: str = ..., return_lse: Literal[False] = ..., out: Tensor | None = ..., smooth_k: bool = ...,
    fallback: str = ..., causal_alignment: str = ..., window: Window | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor | QuantizedKV, v: Tensor | None = ..., attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, layout: str = ...,
    precision: str = ..., return_lse: Literal[True], out: Tensor | None = ..., smooth_k: bool = ...,
    fallback: str = ..., causal_alignment: str = ..., window: Window | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor | QuantizedKV,
    v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "BHSD",
    precision: str = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
    smooth_k: bool = True,
    fallback: str = "error",
    causal_alignment: str = "top_left",
    window: Window | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, softmax(scale * Q K^T + mask) V, with quantized products.

    The first eight arguments are those of torch.nn.functional.scaled_dot_product_attention and mean the same, but that
    a mask and is_causal may come together, and that queries which see no key give 0.

    Args:
        q: queries [B, H, S, D], fp16, bf16 or fp32, any strides. Never modified; nor are k and v. fp32 is computed
            through bf16 and gives an fp32 result. Under torch.autocast q, k, v and a float mask are cast as torch does.
        k: keys [B, Hk, Sk, D], of q's dtype and device; or what `quantize_kv` made of keys and values.
        v: values [B, Hk, Sk, Dv], Dv any; left out with a QuantizedKV.
        attn_mask: bool (True attends), or fp16, bf16 or fp32 to add to the scaled scores (natural-log units; -inf hides
            a key). Broadcasts to [B, H, S, Sk] in both layouts, any strides, not copied; together with is_causal and
            window a key must pass all of them.
        dropout_p: refused above 0.
        is_causal: the query at position p sees keys 0 .. p.
        scale: multiplies Q K^T; D ** -0.5 by default.
        enable_gqa: allow H to be a multiple of Hk.
        layout: "BHSD", or "BSHD" for q, k, v (and out) as [B, S, H, D].
        precision: number format of Q K^T, then of P V: "int8_fp16", "int8_fp8", ...; "auto" takes the best row of
            accuracy class high or standard. A named precision is never changed for another.
        return_lse: also return the log-sum-exp of the scaled (and masked) scores: natural logarithm, fp32 [B, H, S] in
            both layouts; -inf for a query that sees no key.
        out: tensor to write into, of the result's shape, dtype and device; it may share no memory with the inputs.
        smooth_k: subtract K's mean over keys before quantizing (exact under softmax, and more accurate). A QuantizedKV
            keeps what it was made with.
        fallback: "error", or "sdpa" to run scaled_dot_product_attention where no row can serve the call: decided before
            launch, warned about once per reason and counted by `stats`. Not with return_lse, which SDPA does not give,
            nor with a QuantizedKV, whose K is gone.
        causal_alignment: position of query i: "top_left" i, "bottom_right" i + Sk - S. Also places the window.
        window: (left, right): the query at position p sees keys p - left .. p + right only; None or -1 is unbounded.

    Returns:
        The result [B, H, S, Dv] in q's dtype and memory order, or (result, lse).

    Raises:
        InvalidArgumentError: a malformed call (a ValueError).
        UnsupportedError: no kernel row serves it; the message has every row's reasons (a NotImplementedError). Also for
            gradients, forward-mode tangents and torch.func transforms.
        NoDriverError, IntegrityError, CudaError, torch.OutOfMemoryError: as they say; these never fall back.

    On CUDA it runs on the current stream, does not synchronize and can be captured in a CUDA graph. CPU tensors run on
    the reference in torch, with the same arithmetic ("auto" is "int8_fp16" there): correct, not fast.
    """
    key: Any = None
    if not _is_compiling():
        # A call like one that was made before needs no checks, no selection and no packing: see plans.Plan.
        given: Any = (q, k, v)
        try:
            inputs: Any
            if v is None and isinstance(k, QuantizedKV):
                inputs, given = (tensor_key(q), k.key), (q, *k.tensors)
            else:
                inputs = (  # tensor_key() of each
                    q.shape, q.is_contiguous() or q.stride(), q.dtype, q.get_device(),
                    k.shape, k.is_contiguous() or k.stride(), k.dtype, k.get_device(),  # type: ignore[union-attr]
                    v.shape, v.is_contiguous() or v.stride(), v.dtype, v.get_device(),  # type: ignore[union-attr]
                )  # fmt: skip
            key = (
                inputs, dropout_p, is_causal, scale, enable_gqa, layout, precision, return_lse, smooth_k, fallback,
                causal_alignment, window,
                None if attn_mask is None else tensor_key(attn_mask),
                None if out is None else tensor_key(out),
            )  # fmt: skip
            plan = PLANS.by_key.get(key)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            key = plan = None  # no plain tensors, or something malformed, which the checks below name
        if plan is not None:
            if attn_mask is not None:
                given = (*given, attn_mask)
            if ops.is_plain(given if out is None else (*given, out), plan.half):
                return plan.launch(given, out)  # type: ignore[no-any-return]

    checks.check_layout(layout)
    q, k, v, attn_mask = autocast(q, q, k, v, attn_mask)
    quantized = isinstance(k, QuantizedKV)
    if isinstance(k, QuantizedKV):
        checks.check_quantized(q, k, v, layout, precision, enable_gqa)
    else:
        checks.check_qkv(q, k, v, layout, enable_gqa)
    code = precision_of(k.precision if isinstance(k, QuantizedKV) else precision)
    scale = checks.check_scale(scale, q.shape[3])
    checks.check_dropout(dropout_p)
    seen = pattern(is_causal, window, causal_alignment)
    may_fall_back = fallback_module.use_sdpa(fallback) and not quantized
    if layout == "BSHD":
        q = q.transpose(1, 2)
        out = out if out is None else out.transpose(1, 2)
        if not isinstance(k, QuantizedKV) and v is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
    b, h, s, _ = q.shape
    sk = k.shape[2]
    if attn_mask is not None:
        checks.check_mask(attn_mask, q.device, (b, h, s, sk))
    if out is not None:
        inputs = {"q": q, "attn_mask": attn_mask}
        inputs |= {"the QuantizedKV": k.data, "its v": k.v} if isinstance(k, QuantizedKV) else {"k": k, "v": v}
        shape = (b, h, s, k.head_dim_v if isinstance(k, QuantizedKV) else v.shape[3])
        checks.check_out(out, shape, q, inputs, "B, H, S, D")

    tensors = (q, k.v, attn_mask) if isinstance(k, QuantizedKV) else (q, k, v, attn_mask)
    grad = differentiated(*tensors)
    asked = obstacles(dropout_p, grad)
    result: Tensor
    lse: Tensor | None = None
    if asked:
        exact = None
        if may_fall_back and not return_lse and not (grad and out is not None):
            exact = partial(sdpa.attention, q, k, v, attn_mask, dropout_p, seen, scale)  # type: ignore[arg-type]

        def explain() -> Any:
            from sagert.registry import explain

            return explain(
                q, k, v, attn_mask, dropout_p, precision=precision, return_lse=return_lse, smooth_k=smooth_k,
                requires_grad=grad, is_causal=is_causal, causal_alignment=causal_alignment, window=window,
            )  # fmt: skip

        advice = "" if quantized else 'or pass fallback="sdpa"'
        result = refuse(asked, exact, explain if q.device.type == "cuda" else None, advice)
        result = result if out is None else out.copy_(result)
    else:
        options = Options(
            scale, seen.is_causal, code, k.smooth_k if isinstance(k, QuantizedKV) else bool(smooth_k), bool(return_lse),
            may_fall_back, seen.window_left, seen.window_right, seen.bottom_right,
        )  # fmt: skip
        keep = ops.keep(key, layout=layout)
        if isinstance(k, QuantizedKV):
            sizes = (k.shape[1], k.shape[2], k.head_dim_v, k.row)
            result, lse = ops.call("attention_kv", out, q, k.data, k.v, attn_mask, *sizes, *options, keep=keep)
        else:
            result, lse = ops.call("attention", out, q, k, v, attn_mask, *options, keep=keep)
    if layout == "BSHD":
        result = result.transpose(1, 2)
    return (result, lse) if return_lse else result  # type: ignore[return-value]
