// SPDX-License-Identifier: Apache-2.0
// O of e4m3 P and V, in fp16. wgmma reads and writes all of O for every 32 keys, and what the other warps do meanwhile
// waits for the same registers: with half as many it waits half as long.
//
// Nothing overflows: a block adds at most 128 * 112 * 3.5, with P up to 112 and V up to 3.5 (kLargestV), and O is at
// most 3.5 times the sum of P, which is bounded where a block begins: 50176 + 4096 * 3.5 = 64512 of fp16's 65504. A row
// whose sum is beyond the bound has it and O scaled down, and P from there on. Most rows are not dominated by a few
// keys; in the first blocks a lower bound finds them, when their maxima still grow, so that it costs little.
#pragma once

#include "ptx/half2.cuh"
#include "ptx/wgmma.cuh"
#include "tile.cuh"

namespace sagert {

constexpr float kLargestSum = 4096.f;
constexpr float kLargestFirstSum = 512.f;
constexpr int kFirstBlocks = 4;  // where the latter holds
constexpr int kSumSteps = 3;     // log2 of what a sum beyond it is divided by

// Additions round to 11 bits. What kSettleBlocks blocks have added is moved out of the accumulators, except what
// rounding leaves of it, so that those stay small: the error does not grow with the number of keys.
constexpr int kSettleBlocks = 32;
constexpr uint32_t kHalfOne = 0x3c003c00;  // in fp16, twice

struct HalfOutput {
  // Pairs of channels 8 j + 2 quad + {0, 1}: 2 j + r is row r's. The last ones are the sums of P in a block.
  uint32_t sums[kHeadDim / 4 + kOnes / 4];
  uint32_t settled[kHeadDim / 4];
  uint32_t own_pending;  // unless kLimitsInShared

  // What `settled` is yet to be scaled by: row 0 in the low half, row 1 in the high one.
  __device__ __forceinline__ uint32_t& pending(Shared& s) {
    return kLimitsInShared ? s.pending[thread_index() - 128] : own_pending;
  }

  __device__ __forceinline__ void clear(Shared& s) {
    for (uint32_t& x : sums) x = 0;
    for (uint32_t& x : settled) x = 0;
    pending(s) = kHalfOne;
  }

  // Scales row r by `factor`, rounded to fp16; returns what that is.
  __device__ __forceinline__ float scale(Shared& s, int r, float factor) {
    const uint32_t rounded = ptx::to_fp16x2(factor, factor);
#pragma unroll
    for (int i = r; i < kHeadDim / 4; i += 2) sums[i] = ptx::half2_multiply(sums[i], rounded);
    pending(s) = ptx::half2_multiply(pending(s), __byte_perm(rounded, kHalfOne, r == 0 ? 0x5410 : 0x1054));
    return ptx::half2_low(rounded);
  }

  // The sum of P of row r in the last block, cleared for the next one.
  __device__ __forceinline__ float take_sum(int r) {
    const float sum = ptx::half2_low(sums[kHeadDim / 4 + r]);
    sums[kHeadDim / 4 + r] = 0;
    return sum;
  }

  __device__ __forceinline__ void settle(Shared& s) {
    const uint32_t scales[2] = {__byte_perm(pending(s), 0, 0x1010), __byte_perm(pending(s), 0, 0x3232)};
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const uint32_t before = ptx::half2_multiply(settled[i], scales[i % 2]);
      settled[i] = ptx::half2_add(before, sums[i]);
      sums[i] = ptx::half2_subtract(sums[i], ptx::half2_subtract(settled[i], before));
    }
    pending(s) = kHalfOne;
  }

  // O after blocks [begin, end). Without a multiple of kSettleBlocks inside nothing has settled.
  template <int n>
  __device__ __forceinline__ void read(Shared& s, float (&o)[n], int begin, int end) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      o[2 * i] = ptx::half2_low(sums[i]);
      o[2 * i + 1] = ptx::half2_high(sums[i]);
    }
    if (begin / kSettleBlocks == (end - 1) / kSettleBlocks) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const float scale = i % 2 == 0 ? ptx::half2_low(pending(s)) : ptx::half2_high(pending(s));
      o[2 * i] = fmaf(ptx::half2_low(settled[i]), scale, o[2 * i]);
      o[2 * i + 1] = fmaf(ptx::half2_high(settled[i]), scale, o[2 * i + 1]);
    }
  }
};

}  // namespace sagert
