// SPDX-License-Identifier: Apache-2.0
// How the pre-passes leave V and attention reads it. The build says the type of the parameter V or V8 by argument.
#pragma once

#include "integers.cuh"

namespace sagert {

// From the pre-pass in FP8, in INT8, or in fp16 and below 1, so that a few of its products can be summed in fp16; or in
// 16 bits, as the caller has it.
enum class V { kFp8, kInt8, kHalf, kIo };
#if V_I8 || V8_I8
constexpr V kV = V::kInt8;
using VOut = int8_t;          // as the pre-pass leaves it
using VScaleType = uint16_t;  // bf16, of a block of keys and a channel
#elif V_FP8E4NV || V8_FP8E4NV
constexpr V kV = V::kFp8;
using VOut = uint8_t;
using VScaleType = float;  // of a channel
#elif V_FP16S || V8_FP16S
constexpr V kV = V::kHalf;
using VOut = uint16_t;
using VScaleType = float;  // of a channel, a power of two
#else
constexpr V kV = V::kIo;
using VOut = uint16_t;     // where it is copied
using VScaleType = float;  // none
#endif

}  // namespace sagert
