// SPDX-License-Identifier: Apache-2.0
// Arithmetic and conversions that C++ does not name.
#pragma once

#include "integers.cuh"

namespace sagert {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float nan() { return __int_as_float(0x7fffffff); }

}  // namespace sagert

namespace sagert::ptx {

// Hides from the compiler what `value` is, so that it cannot keep what was computed from it.
__device__ __forceinline__ void forget(int& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ void forget(const int8_t*& value) { asm volatile("" : "+l"(value)); }

// 2^x, relative error 2^-22, subnormal results flushed to 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, relative error 2^-23, subnormal numbers taken for 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two fp32 to e4m3, rounded to nearest even and clamped to +-448; `low` in the low byte.
__device__ __forceinline__ uint16_t to_e4m3x2(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// Two 16-bit halves to one register.
__device__ __forceinline__ uint32_t pack_halves(uint16_t low, uint16_t high) {
  uint32_t packed;
  asm("mov.b32 %0, {%1, %2};" : "=r"(packed) : "h"(low), "h"(high));
  return packed;
}

// Two fp32 to fp16 or bf16, rounded to nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t to_fp16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float from_fp16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace sagert::ptx
