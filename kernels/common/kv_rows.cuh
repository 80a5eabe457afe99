// SPDX-License-Identifier: Apache-2.0
// Pre-passes: rows of K and V of one head as they come from memory, and their extrema.
#pragma once

#include "integers.cuh"
#include "ptx/minmax.cuh"
#include "quantize.cuh"

#ifndef KEYS
#define KEYS 128
#endif

namespace sagert {
using namespace ptx;

constexpr int kHeadDim = stored_channels(HEAD_DIM);
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = KEYS;                   // keys
constexpr int kTileBytes = kBlock * kHeadDim;  // of K8 in INT8, and of V8
constexpr int kKRowBytes = k_row_bytes(kHeadDim), kKTileBytes = kBlock * kKRowBytes;
constexpr int kChunks = kHeadDim / 8;  // 16-byte loads per row
constexpr int kRowsPerPass = kThreads / kChunks;
constexpr int kKGroups = 4;           // scales of K per block
constexpr int kNever = 2147483647;    // a key that no query reaches
constexpr float kShiftMax = 1.0e30f;  // no larger mean is subtracted: the difference must stay finite

#if K_BF16
constexpr uint32_t kInfBits = 0x7f80;
#else
constexpr uint32_t kInfBits = 0x7c00;
#endif
constexpr uint32_t kPlusInf2 = kInfBits | kInfBits << 16;
constexpr uint32_t kMinusInf2 = kPlusInf2 | 0x80008000u;

__device__ __forceinline__ uint32_t min2(uint32_t a, uint32_t b) {
#if K_BF16
  return min_nan_bf16x2(a, b);
#else
  return min_nan_fp16x2(a, b);
#endif
}
__device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) {
#if K_BF16
  return max_nan_bf16x2(a, b);
#else
  return max_nan_fp16x2(a, b);
#endif
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }

// x with its non-finite halves replaced by those of `by`.
__device__ __forceinline__ uint32_t replace_nonfinite(uint32_t x, uint32_t by) {
  uint32_t mask = 0;
  if ((x & kInfBits) == kInfBits) mask |= 0xffffu;
  if ((x >> 16 & kInfBits) == kInfBits) mask |= 0xffff0000u;
  return (x & ~mask) | (by & mask);
}

// Extrema of pairs of channels, exact in the input's type. Infinities and NaN stay.
template <int words>
struct Extrema {
  uint32_t min[words], max[words];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < words; ++i) min[i] = kPlusInf2, max[i] = kMinusInf2;
  }
  __device__ __forceinline__ void add(const uint32_t (&x)[words]) {
#pragma unroll
    for (int i = 0; i < words; ++i) min[i] = min2(min[i], x[i]), max[i] = max2(max[i], x[i]);
  }
  __device__ __forceinline__ void add_finite(const uint32_t (&x)[words]) {
#pragma unroll
    for (int i = 0; i < words; ++i) {
      min[i] = min2(min[i], replace_nonfinite(x[i], kPlusInf2));
      max[i] = max2(max[i], replace_nonfinite(x[i], kMinusInf2));
    }
  }
  __device__ __forceinline__ float lowest(int i) const { return i % 2 ? high_io(min[i / 2]) : low_io(min[i / 2]); }
  __device__ __forceinline__ float highest(int i) const { return i % 2 ? high_io(max[i / 2]) : low_io(max[i / 2]); }
  // Largest |x - shift| of channel i; 0 when there was no x.
  __device__ __forceinline__ float amax(int i, float shift) const {
    return max_nan(0.0f, max_nan(highest(i) - shift, shift - lowest(i)));
  }
};

// K or V of one head.
struct Input {
  const uint16_t* base;
  int64_t row_stride;
  const volatile int64_t* channel_stride;  // read anew each time: the slow path keeps no registers over the fast one
  int rows, channels;
  bool vectors;  // rows are contiguous and 16-byte aligned, channels a multiple of 8
};

// Rows row, row + step, ..., 2 * words channels each from `channel` on; zeros beyond the tensor.
template <int loads, int words>
__device__ __forceinline__ void load_rows(uint32_t (&x)[loads][words], const Input& in, int row, int step,
                                          int channel) {
  const uint16_t* source = in.base + row * in.row_stride;
  int64_t source_step = step * in.row_stride;
  int left = in.rows - row;
  if (in.vectors) {
    source += channel;
    if (channel >= in.channels) left = 0;
#pragma unroll
    for (int i = 0; i < loads; ++i, source += source_step) {
#pragma unroll
      for (int j = 0; j < words; ++j) x[i][j] = 0;
      if (i * step >= left) continue;
      if constexpr (words == 4) {
        uint4 y = *reinterpret_cast<const uint4*>(source);
        x[i][0] = y.x, x[i][1] = y.y, x[i][2] = y.z, x[i][3] = y.w;
      } else if constexpr (words == 2) {
        uint2 y = *reinterpret_cast<const uint2*>(source);
        x[i][0] = y.x, x[i][1] = y.y;
      } else {
        x[i][0] = *reinterpret_cast<const uint32_t*>(source);
      }
    }
  } else {
    int64_t channel_stride = *in.channel_stride;
    source += channel * channel_stride;
    int channels_left = in.channels - channel;
#pragma unroll 1  // and the rows move through x: little code for a slow path
    for (int i = 0; i < loads; ++i, source += source_step, left -= step) {
      uint32_t halves[2 * words];
      const uint16_t* half = source;
#pragma unroll
      for (int j = 0; j < 2 * words; ++j, half += channel_stride) {
        halves[j] = left > 0 && j < channels_left ? *half : 0;
      }
#pragma unroll
      for (int j = 0; j < words; ++j) {
#pragma unroll
        for (int k = 1; k < loads; ++k) x[k - 1][j] = x[k][j];
        x[loads - 1][j] = halves[2 * j] | halves[2 * j + 1] << 16;
      }
    }
  }
}

}  // namespace sagert
