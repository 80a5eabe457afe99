# SPDX-License-Identifier: Apache-2.0
"""Corrections to Triton's CPU interpreter, which executes the portable kernels in the tests.

Its casts from fp32 to fp8 and bfloat16 do not round to nearest even, and those to fp8 do not saturate; its dot
multiplies the bit patterns of bfloat16; a reduction with a custom combine function visits one element at a time.
"""

import numpy as np
import prepass
import torch
import triton.language as tl
from triton.runtime import interpreter

E4M3_MAX = 448.0

_stock_convert = interpreter._convert_float
_stock_dot = interpreter.InterpreterBuilder.create_dot
_stock_reduce = interpreter.ReduceOps.generic_reduce


def _convert_float(value, src, dst, rounding):
    if src != tl.float32 or dst not in (tl.float8e4nv, tl.bfloat16):
        return _stock_convert(value, src, dst, rounding)
    x = torch.from_numpy(np.ascontiguousarray(np.asarray(value)).view(np.float32).copy())
    if dst == tl.bfloat16:
        return x.bfloat16().view(torch.uint16).numpy()
    # clamp keeps NaN, as the hardware's satfinite conversion does
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _bf16_values(handle):
    return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar != tl.bfloat16:
        return _stock_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    return interpreter.TensorHandle(np.matmul(_bf16_values(a), _bf16_values(b)) + d.data, d.dtype.scalar)


def _generic_reduce(self, inputs):
    if self.combine_fn is not prepass._nan_max or self.axis is None:
        return _stock_reduce(self, inputs)
    (x,) = inputs
    data = np.maximum.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)  # NaN wins, as in the kernels
    return [self.to_tensor(data, x.dtype)]


def install() -> None:
    """Puts the corrections in place; call once before the first kernel runs."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.ReduceOps.generic_reduce = _generic_reduce
