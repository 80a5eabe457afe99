// SPDX-License-Identifier: Apache-2.0
// Sums of P V in fp16, with e4m3 P and V. wgmma reads and writes all of them for every 32 keys, and what the other
// warps do meanwhile waits for the same registers: with half as many it waits half as long.
//
// fp16 ends at 65504. The pre-pass scales V so that its root mean square is 1 to 2, P is 112 at a row's maximum, and a
// row whose sum of P exceeds kLargestSum when it is looked at has P scaled down from there on, which costs no precision
// where that many keys count. Nearly all rows stay far below the end; where a sum has left it the tile is computed
// again with sums in fp32 (queue.cuh): infinities and NaN stay in a sum, so that none is overlooked.
#pragma once

#include "ptx/half2.cuh"
#include "ptx/wgmma.cuh"
#include "tile.cuh"

namespace sagert {

constexpr float kLargestSum = 16384.f;
constexpr int kSumExponent = 12;  // of a larger one, scaled down

// Additions round to 11 bits, and equal ones in a row may all round the same way. What kSettleSteps steps have added
// is moved to other sums, except what rounding leaves of it, so that the sums stay small beside what is added. The
// settled ones would take too many registers: they lie where the next tile's queries go, which wait for it.
struct HalfSums {
  // Pairs of channels 8 j + 2 quad + {0, 1}: 2 j + r is row r's. The last ones are the sums of P in a step.
  uint32_t sums[kHeadDim / 4 + kOnes / 4];
  float factor[2];  // what each row's settled sums are to be multiplied by

  __device__ __forceinline__ void clear() {
    for (uint32_t& x : sums) x = 0;
    factor[0] = factor[1] = 1.f;
  }

  // This thread's settled sums are every 128th word from here on.
  static __device__ __forceinline__ uint32_t* settled(Shared& s) {
    const uint32_t thread = thread_index() - 128;
    return reinterpret_cast<uint32_t*>(s.raw) + thread / 128 * (kHeadDim / 4 * 128) + thread % 128;
  }

  // Scales row r by `by`, rounded to fp16; returns what that is.
  __device__ __forceinline__ float scale(int r, float by) {
    const uint32_t rounded = ptx::to_fp16x2(by, by);
#pragma unroll
    for (int i = r; i < kHeadDim / 4; i += 2) sums[i] = ptx::half2_multiply(sums[i], rounded);
    const float scaled_by = ptx::half2_low(rounded);
    factor[r] *= scaled_by;
    return scaled_by;
  }

  // The sum of P of row r in the last step, cleared for the next one.
  __device__ __forceinline__ float take_sum(int r) {
    const float sum = ptx::half2_low(sums[kHeadDim / 4 + r]);
    sums[kHeadDim / 4 + r] = 0;
    return sum;
  }

  // `first`: none are settled yet.
  __device__ __forceinline__ void settle(Shared& s, bool first) {
    uint32_t* words = settled(s);
    uint32_t factors[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) factors[r] = ptx::to_fp16x2(factor[r], factor[r]);
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const uint32_t before = first ? 0 : ptx::half2_multiply(words[128 * i], factors[i % 2]);
      const uint32_t after = ptx::half2_add(before, sums[i]);
      sums[i] = ptx::half2_subtract(sums[i], ptx::half2_subtract(after, before));
      words[128 * i] = after;
    }
    factor[0] = factor[1] = 1.f;
  }

  // Has a sum left fp16's range?
  __device__ __forceinline__ bool has_overflown() const {
    uint32_t zeros = 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) zeros = ptx::half2_fma(sums[i], 0, zeros);
    return (zeros & 0x7fff7fffu) != 0;
  }

  // The sums in fp32.
  template <int n>
  __device__ __forceinline__ void read(float (&o)[n], Shared& s, bool has_settled) const {
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      o[2 * i] = ptx::half2_low(sums[i]);
      o[2 * i + 1] = ptx::half2_high(sums[i]);
    }
    if (!has_settled) return;
    const uint32_t* words = settled(s);
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const uint32_t before = words[128 * i];
      o[2 * i] = fmaf(ptx::half2_low(before), factor[i % 2], o[2 * i]);
      o[2 * i + 1] = fmaf(ptx::half2_high(before), factor[i % 2], o[2 * i + 1]);
    }
  }
};

}  // namespace sagert
