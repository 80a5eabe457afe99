# SPDX-License-Identifier: Apache-2.0
"""What manifests may say, and the numbers that stand for it in the kernel table."""

from __future__ import annotations

ROLES = (  # host/table.h: Role
    "kv_stats", "quantize_kv", "quantize_q", "attention", "combine", "scan_mask", "list_blocks", "repair",
    "attention_lse",
)  # fmt: skip
PRECISIONS = {
    "int8_fp16": 1, "int8_fp8": 2, "int8_int8": 3, "int4_fp8": 4, "nvfp4": 5, "int4_fp16": 6, "int4_int8": 7,
}  # fmt: skip
ACCURACIES = {"high": 0, "standard": 1, "low": 2}
FLAGS = {
    "causal": 1, "lse": 2, "mask": 4, "dropout": 8, "grad": 16, "no_smooth_k": 32, "varlen": 64, "window": 128,
    "bottom_right": 256, "quantized_kv": 512,
}  # fmt: skip
DTYPES = {"fp16": 1, "bf16": 2}
SCALARS = ("i1", "i8", "i16", "i32", "i64", "fp32", "fp64")
POINTEES = (*SCALARS, "u8", "i4", "fp16", "fp16s", "bf16", "fp8e4nv", "fp8e5")  # i4: two to a byte; fp16s: scaled
AXES = ("head_dim", "causal", "dtype")
# Of a CUDA kernel: how it is launched. Templates read them as they read options: "$cluster".
LAUNCH = ("threads", "shared", "cluster", "ctas_per_sm")
