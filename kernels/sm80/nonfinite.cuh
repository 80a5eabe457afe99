// SPDX-License-Identifier: Apache-2.0
// Infinities and NaN of 16-bit V in shared memory.
#pragma once

#include "copies.cuh"

namespace sagert {

template <int bytes>
__device__ __forceinline__ void clear_nonfinite(int8_t* values) {
  constexpr uint32_t kExponent = SAGERT_IO_INFINITY;
  auto clear = [](uint32_t& pair) {
    if ((pair & kExponent) == kExponent) pair &= 0xffff0000u;
    if ((pair >> 16 & kExponent) == kExponent) pair &= 0xffffu;
  };
  uint4* vectors = reinterpret_cast<uint4*>(values);
#pragma unroll 1
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) {
    uint4 x = vectors[i];
    clear(x.x), clear(x.y), clear(x.z), clear(x.w);
    vectors[i] = x;
  }
}

// Zeroes those of a step, which would reach even queries that do not see them; Warp::add_nonfinite() gives them to
// those that do.
__device__ __forceinline__ void clear_nonfinite(Shared& s, int slot) {
  clear_nonfinite<kVTileBytes>(s.v[stage_of(slot)]);
  if constexpr (kTailKeys != 0) clear_nonfinite<kTailBytes>(s.v_tail[slot & (kTails - 1)]);
}

}  // namespace sagert
