// SPDX-License-Identifier: Apache-2.0
// What every kernel that quantizes shares: halves of the row's 16-bit type, rounding to INT8, and wgmma's swizzle.
#pragma once

#include "integers.cuh"
#include "ptx/numeric.cuh"

// The build says the 16-bit type by argument; all of a kernel's inputs have the same.
#if Q_BF16 || K_BF16 || OUT_BF16
#define SAGERT_IO_BF16 1
#define SAGERT_IO_INFINITY 0x7f80u  // bits of the 16-bit type's exponent
#else
#define SAGERT_IO_INFINITY 0x7c00u
#endif

namespace sagert {

constexpr float kTiny = 1.0e-30f;      // below this a row or channel counts as zero: 127 / amax must stay finite
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even, in the low bits

__device__ __forceinline__ float low_io(uint32_t pair) {
#if SAGERT_IO_BF16
  return __uint_as_float(pair << 16);
#else
  return ptx::from_fp16(static_cast<uint16_t>(pair));
#endif
}

__device__ __forceinline__ float high_io(uint32_t pair) {
#if SAGERT_IO_BF16
  return __uint_as_float(pair & 0xffff0000u);
#else
  return ptx::from_fp16(static_cast<uint16_t>(pair >> 16));
#endif
}

__device__ __forceinline__ uint32_t to_io2(float low, float high) {
#if SAGERT_IO_BF16
  return ptx::to_bf16x2(low, high);
#else
  return ptx::to_fp16x2(low, high);
#endif
}

// Round to nearest even of x * inverse, whose magnitude is at most 127, as int8 in the low byte.
__device__ __forceinline__ uint32_t to_int8(float x, float inverse) {
  return __float_as_uint(fmaf(x, inverse, kRound));
}

// Low nibbles of eight words, the first lowest.
__device__ __forceinline__ uint32_t pack_nibbles(const uint32_t (&x)[8]) {
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) packed |= (x[i] & 15) << 4 * i;
  return packed;
}

// Low bytes of four words, the first lowest.
__device__ __forceinline__ uint32_t pack_low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Channels of a head as the pre-passes of the tuned families store them.
constexpr int stored_channels(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// K, and Q beside it: INT8, or INT4, eight channels to a word, the first lowest. The build says K8's type by argument.
#if K8_I4
constexpr bool kInt4 = true;
#else
constexpr bool kInt4 = false;
#endif
constexpr float kCodeMax = kInt4 ? 7.0f : 127.0f;

// Bytes of a key's row of `channels` stored channels; of INT4 at least 64.
constexpr int k_row_bytes(int channels) { return !kInt4 ? channels : channels <= 128 ? 64 : channels / 2; }

// Which 16-byte chunk of a row of `row_bytes` (64, or a multiple of 128) the swizzle puts chunk `chunk` of row `row`
// at.
template <int row_bytes>
__device__ __forceinline__ int swizzled(int chunk, int row) {
  return chunk ^ (row_bytes >= 128 ? row & 7 : row >> 1 & 3);
}

}  // namespace sagert
