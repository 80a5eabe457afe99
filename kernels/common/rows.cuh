// SPDX-License-Identifier: Apache-2.0
// Rows of a tensor-core fragment. Four lanes share a row; lane t holds columns 8 j + 2 (t % 4) + {0, 1} of it.
#pragma once

#include "quantize.cuh"

namespace sagert {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.402823466e38f;  // of a row that has seen no key

// ---- Queries: one scale per row ----

struct RowScale {
  float inverse, scale;
};

// From the bits of the largest magnitude in a row: a NaN or an infinity in Q makes every score of the row NaN.
__device__ __forceinline__ RowScale row_scale(uint32_t top, float scale_log2) {
  float amax = low_io(top);
  bool finite = amax < infinity();
  float inverse = finite && amax >= kTiny ? ptx::reciprocal_approx(amax * 0x1p-8f) * (127.f * 0x1p-8f) : 0.f;
  return {copysignf(inverse, scale_log2), finite ? amax * (1.f / 127.f) * fabsf(scale_log2) : nan()};
}

// Four channels as int8, the first in the low byte.
__device__ __forceinline__ uint32_t quantize4(uint32_t first, uint32_t second, float inverse) {
  return pack_low_bytes(to_int8(low_io(first), inverse), to_int8(high_io(first), inverse),
                        to_int8(low_io(second), inverse), to_int8(high_io(second), inverse));
}

// Largest, and sum, over the 4 lanes of a row.
__device__ __forceinline__ uint32_t row_max(uint32_t value) {
  value = max(value, __shfl_xor_sync(~0u, value, 1));
  return max(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <typename T>
__device__ __forceinline__ T row_sum(T value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// ---- Output ----

// Stores a row of O in 16 bits; x(j) is the lane's pair of columns 8 j + 2 quad + {0, 1}, in fp32. The 4 lanes of a row
// have 2 of each 8 channels: they exchange them until each has 8, for one store of 16 bytes. In exchange 1 and 2 a lane
// keeps the halves whose index has its own bit. All lanes of the warp call it.
template <int channels, typename Pair>
__device__ __forceinline__ void store_row(uint16_t* place, int quad, bool inside, Pair pair) {
  const bool odd = quad & 1, upper = quad & 2;
#pragma unroll
  for (int j = 0; j < channels / 8; j += 4) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = pair(j + i);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t got = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
      (odd ? x[i] : x[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t got = __shfl_xor_sync(~0u, upper ? x[i] : x[i + 2], 2);
      (upper ? x[i] : x[i + 2]) = got;
    }
    if (inside) *reinterpret_cast<uint4*>(place + 8 * (j + quad)) = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

}  // namespace sagert
