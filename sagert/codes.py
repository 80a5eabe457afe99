# SPDX-License-Identifier: Apache-2.0
"""Names and numbers of the C ABI's enumerations: the one place where they meet."""

from __future__ import annotations

from sagert.errors import InvalidArgumentError

PRECISIONS: dict[str, int] = {
    "auto": 0,
    "int8_fp16": 1,
    "int8_fp8": 2,
    "int8_int8": 3,
    "int4_fp8": 4,
    "nvfp4": 5,
    "int4_fp16": 6,
    "int4_int8": 7,
}
PRECISION_NAMES: dict[int, str] = {code: name for name, code in PRECISIONS.items()}

DTYPES: dict[str, int] = {"float16": 1, "bfloat16": 2, "float32": 3}
DTYPE_NAMES: dict[int, str] = {code: name for name, code in DTYPES.items()}
MASK_DTYPES: dict[str, int] = {**DTYPES, "bool": 4}
_DTYPE_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}

ACCURACY_NAMES: dict[int, str] = {0: "high", 1: "standard", 2: "low"}

FLAG_CAUSAL = 1
FLAG_LSE = 2
FLAG_MASK = 4
FLAG_DROPOUT = 8
FLAG_GRAD = 16
FLAG_NO_SMOOTH_K = 32
FLAG_VARLEN = 64
FLAG_WINDOW = 128
FLAG_BOTTOM_RIGHT = 256
FLAG_QUANTIZED_KV = 512
FLAG_NAMES: dict[int, str] = {
    FLAG_CAUSAL: "causal",
    FLAG_LSE: "lse",
    FLAG_MASK: "mask",
    FLAG_DROPOUT: "dropout",
    FLAG_GRAD: "grad",
    FLAG_NO_SMOOTH_K: "no_smooth_k",
    FLAG_VARLEN: "varlen",
    FLAG_WINDOW: "window",
    FLAG_BOTTOM_RIGHT: "bottom_right",
    FLAG_QUANTIZED_KV: "quantized_kv",
}


def precision_code(name: str) -> int:
    """Number of a precision; InvalidArgumentError names the accepted ones."""
    try:
        return PRECISIONS[name]
    except (KeyError, TypeError):
        raise InvalidArgumentError(
            f"precision={name!r} is not a precision: use one of {', '.join(map(repr, PRECISIONS))}"
        ) from None


def dtype_code(dtype: object) -> int:
    """Number of a dtype given as a torch.dtype or a name such as "float16" or "bf16"."""
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    try:
        return DTYPES[name]
    except KeyError:
        raise InvalidArgumentError(
            f"dtype={dtype!s} is not served: use torch.float16, torch.bfloat16 or torch.float32"
        ) from None


def mask_dtype_code(dtype: object) -> int:
    """Number of a mask's dtype: bool, or an additive mask's float type."""
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    try:
        return MASK_DTYPES[name]
    except KeyError:
        raise InvalidArgumentError(
            f"attn_mask has dtype {dtype!s}: give torch.bool, torch.float16, torch.bfloat16 or torch.float32"
        ) from None


def flag_names(flags: int) -> tuple[str, ...]:
    """Names of the set bits."""
    return tuple(name for bit, name in FLAG_NAMES.items() if flags & bit)
