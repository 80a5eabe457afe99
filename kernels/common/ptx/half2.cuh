// SPDX-License-Identifier: Apache-2.0
// Arithmetic on pairs of fp16, or bf16, in one register, rounded to nearest even.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t half2_add(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t half2_subtract(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t half2_multiply(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t bfloat2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ float half2_low(uint32_t x) {
  float low;
  asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}\n" : "=f"(low) : "r"(x));
  return low;
}

__device__ __forceinline__ float half2_high(uint32_t x) {
  float high;
  asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;\n}\n" : "=f"(high) : "r"(x));
  return high;
}

// The low half plus the high half, in fp32.
__device__ __forceinline__ float half2_sum(uint32_t x) { return half2_low(x) + half2_high(x); }

// Both to e4m3, clamped to +-448; the low half's in the low byte.
__device__ __forceinline__ uint16_t half2_to_e4m3x2(uint32_t x) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(packed) : "r"(x));
  return packed;
}

// a * b + c, clamped to [0, 1]; 0 for NaN.
__device__ __forceinline__ float fma_saturated(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

}  // namespace sagert::ptx
