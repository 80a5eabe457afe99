// SPDX-License-Identifier: Apache-2.0
// Bounds of scores, known before they are: no score exceeds the product of its query's norm and its key's (Cauchy and
// Schwarz). Where that keeps all of a row's exponents within P's range, the row's maximum need not be looked for once
// it has an offset. P in bf16 has the exponents of fp32, which leave room for a loose bound; fp16 and e4m3 do not.
#pragma once

#include "quantize.cuh"
#include "values.cuh"

namespace sagert {

#if SAGERT_IO_BF16
constexpr bool kNormsOfK = kV == V::kIo && !kInt4;
#else
constexpr bool kNormsOfK = false;
#endif
// The blocks of the pre-pass that share a head's keys each have a bound of their norms.
constexpr int kNormSlots = 32;
// P's exponent at a row's maximum is not taken lower. Another 2^-46 of it is a normal number still.
constexpr float kLowestMaximum = -80.f;
// Bounds above this help nobody, and below it a step of an integer score is less than 1/64 in the exponent: the largest
// code of a query's and of a key's group is 127, so a step is at most the bound divided by 127 * 127.
constexpr float kLargestBound = 250.f;

// `sum` and the squares of four int8.
__device__ __forceinline__ int add_squares(uint32_t four, int sum) {
  return __dp4a(static_cast<int>(four), static_cast<int>(four), sum);
}

// ---- Pre-pass ----

// Each block fills its share of a head's slots.
__device__ __forceinline__ void write_norm(float* slots, float norm, int part, int parts) {
  for (int i = part; i < kNormSlots; i += parts) slots[i] = norm;
}

// ---- Attention ----

// This lane's slot of a head's norms, and the largest of the warp's.
__device__ __forceinline__ const float* norm_slot(const float* slots, int head) {
  return slots + static_cast<int64_t>(head) * kNormSlots + threadIdx.x % 32;
}
__device__ __forceinline__ float largest_norm(float slot) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(slot)));
}

// What no score of a query exceeds, in the unit of the exponent: of its scale, the sum of its codes' squares, and the
// largest norm of its keys. NaN where one of these is not finite.
__device__ __forceinline__ float score_bound(float scale, int squares, float norm) {
  return 1.001f * scale * sqrtf(static_cast<float>(squares)) * norm;
}

// Offset of a row's exponents, given its largest score so far and its bound: its maximum's exponent is `at_maximum`, or
// a whole number less, so that no exponent to come exceeds `largest`, if that can be.
__device__ __forceinline__ float bounded_offset(float highest, float bound, float at_maximum, float largest) {
  const float excess = ceilf(bound - highest - (largest - at_maximum));
  const bool fits = bound <= kLargestBound & excess <= at_maximum - kLowestMaximum;
  return at_maximum - highest - (fits ? fmaxf(excess, 0.f) : 0.f);
}

// No score to come moves this offset.
__device__ __forceinline__ bool is_bounded(float offset, float bound, float largest) {
  return bound <= kLargestBound & offset <= largest - bound;
}

}  // namespace sagert
