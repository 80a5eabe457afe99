// SPDX-License-Identifier: Apache-2.0
// Pre-pass, phase 1: constants, shared memory, loads of rows, and column statistics and their sums over the cluster.
#pragma once

#include "integers.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/minmax.cuh"
#include "quantize.cuh"

#ifndef CLUSTER
#define CLUSTER 8
#endif

namespace sagert {
using namespace ptx;

constexpr int kHeadDim = HEAD_DIM;
constexpr int kClusterMax = CLUSTER;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = 128;                    // keys
constexpr int kTileBytes = kBlock * kHeadDim;  // of K8 and of V8
constexpr int kChunks = kHeadDim / 8;          // 16-byte loads per row
constexpr int kRowsPerPass = kThreads / kChunks;
constexpr int kKGroups = 4;           // scales of K per block
constexpr int kNever = 2147483647;    // a key that no query reaches
constexpr float kShiftMax = 1.0e30f;  // no larger mean is subtracted: the difference must stay finite

#if V8_I8
constexpr bool kInt8V = true, kQuantizedV = true;
using VOut = int8_t;
using VScaleType = uint16_t;  // bf16
#elif V8_FP8E4NV
constexpr bool kInt8V = false, kQuantizedV = true;
using VOut = uint8_t;
using VScaleType = float;
#else
constexpr bool kInt8V = false, kQuantizedV = false;
using VOut = uint16_t;
using VScaleType = float;
#endif

// Column statistics in their order: sum, sum of squares, minimum, maximum. A job needs the first few.
enum Statistic { kSum, kSquares, kMin, kMax };
constexpr int kKStats = 1;
constexpr int kVStats = !kQuantizedV ? 1 : kInt8V ? 2 : 4;
constexpr int kStatsMax = 4;

struct alignas(128) Shared {
  union {
    uint8_t tile[2][kTileBytes];
    float partial[kWarps][kStatsMax][kHeadDim];
  };
  float shift[kHeadDim], inverse[kHeadDim];
  float v_amax[kInt8V ? 2 : 1][kInt8V ? kWarps : 1][kHeadDim];
  uint32_t k_amax[2][kWarps], k_bad[2][kWarps];
  int head_nonfinite;
  int64_t channel_stride;
  // Read by the whole cluster.
  int nonfinite;
  int first[2][kHeadDim];  // first key that is +inf or NaN, -inf or NaN; of use where `nonfinite` is set
  float stats[kStatsMax][kHeadDim];
};

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

// ---- Phase 1: column statistics ----

// Of the 8 channels of a thread.
template <int stats>
struct Columns {
  float sum[8], squares[8];
  Extrema<4> extrema;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = squares[i] = 0.0f;
    extrema.clear();
  }

  __device__ __forceinline__ void add_sums(const uint32_t (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = i % 2 ? high_io(x[i / 2]) : low_io(x[i / 2]);
      sum[i] += value;
      if constexpr (stats > kSquares) squares[i] = fmaf(value, value, squares[i]);
    }
  }

  __device__ __forceinline__ void add(const uint32_t (&x)[4]) {
    add_sums(x);
    if constexpr (stats > kMin) extrema.add(x);
  }

  // Leaves non-finite entries out and notes their first keys.
  __device__ __forceinline__ void add_finite(const uint32_t (&x)[4], Shared& s, int row, int channel) {
    uint32_t finite[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) finite[i] = replace_nonfinite(x[i], 0);
    add_sums(finite);
    if constexpr (stats > kMin) extrema.add_finite(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = i % 2 ? high_io(x[i / 2]) : low_io(x[i / 2]);
      if (is_finite(value)) continue;
      s.nonfinite = 1;
      if (!(value < 0.0f)) atomicMin(&s.first[0][channel + i], row);
      if (!(value > 0.0f)) atomicMin(&s.first[1][channel + i], row);
    }
  }

  __device__ __forceinline__ float get(int statistic, int i) const {
    if (statistic == kSum) return sum[i];
    if (statistic == kSquares) return squares[i];
    return statistic == kMin ? extrema.lowest(i) : extrema.highest(i);
  }
};

template <int statistic>
__device__ __forceinline__ float combine(float a, float b) {
  if constexpr (statistic == kMin) return fminf(a, b);
  if constexpr (statistic == kMax) return fmaxf(a, b);
  return a + b;
}

template <int statistic>
__device__ __forceinline__ void publish_warp(Shared& s, float (&x)[8]) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int step = 16; step >= kChunks; step /= 2) {
      x[i] = combine<statistic>(x[i], __shfl_xor_sync(0xffffffffu, x[i], step));
    }
  }
  if (lane < kChunks) {
    float4* out = reinterpret_cast<float4*>(&s.partial[warp][statistic][8 * lane]);
    out[0] = make_float4(x[0], x[1], x[2], x[3]);
    out[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
}

template <int stats, int statistic = 0>
__device__ __forceinline__ void publish_columns(Shared& s, const Columns<stats>& columns) {
  if constexpr (statistic < stats) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = columns.get(statistic, i);
    publish_warp<statistic>(s, x);
    publish_columns<stats, statistic + 1>(s, columns);
  }
}

// The block's statistic of one channel; it also goes to where the cluster reads it.
template <int stats, int statistic = 0>
__device__ __forceinline__ void reduce_warps(Shared& s, int channel) {
  if constexpr (statistic < stats) {
    float x = s.partial[0][statistic][channel];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x = combine<statistic>(x, s.partial[warp][statistic][channel]);
    s.stats[statistic][channel] = x;
    reduce_warps<stats, statistic + 1>(s, channel);
  }
}

// Statistics of rows [row, end) in s.stats, s.first and s.nonfinite. The caller synchronizes before reading them.
template <int stats>
__device__ __forceinline__ void column_statistics(Shared& s, const Input& in, int row, int end) {
  constexpr int kLoads = 4;  // two such groups are in flight: one is reloaded while the other is added
  constexpr int kStep = kLoads * kRowsPerPass;
  int channel = 8 * (threadIdx.x % kChunks);
  int thread_row = threadIdx.x / kChunks;
  Input part = in;
  part.rows = end;
  Columns<stats> columns;
  columns.clear();

  uint32_t x[2][kLoads][4];
  int r = row + thread_row;
#pragma unroll
  for (int group = 0; group < 2; ++group) load_rows(x[group], part, r + group * kStep, kRowsPerPass, channel);
#pragma unroll 1
  for (int full = (end - row) / (2 * kStep); full > 0; --full) {
#pragma unroll
    for (int group = 0; group < 2; ++group, r += kStep) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) columns.add(x[group][i]);
      load_rows(x[group], part, r + 2 * kStep, kRowsPerPass, channel);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kLoads; ++i) {
    if (r + i * kRowsPerPass < end) columns.add(x[i / kLoads][i % kLoads]);
  }
  publish_columns(s, columns);
  if (threadIdx.x == 0) s.nonfinite = 0;
  __syncthreads();
  bool overflow = false;
  if (threadIdx.x < kHeadDim) {
    reduce_warps<stats>(s, threadIdx.x);
    s.first[0][threadIdx.x] = s.first[1][threadIdx.x] = kNever;
    overflow = !is_finite(s.stats[kSum][threadIdx.x]);
  }
  if (!__syncthreads_or(overflow)) return;

  // Rare: an infinity, a NaN, or a sum beyond fp32.
  columns.clear();
#pragma unroll 1
  for (r = row + thread_row; r < end; r += kRowsPerPass) {
    uint32_t single[1][4];
    load_rows(single, part, r, kRowsPerPass, channel);
    columns.add_finite(single[0], s, r, channel);
  }
  publish_columns(s, columns);
  __syncthreads();
  if (threadIdx.x < kHeadDim) reduce_warps<stats>(s, threadIdx.x);
}

// One channel's statistic over all blocks of the cluster, in the order of their ranks.
template <int statistic>
__device__ __forceinline__ float reduce_cluster(Shared& s, int channel) {
  uint32_t address = shared_address(&s.stats[statistic][channel]);
  const int last = static_cast<int>(cluster_size()) - 1;
  float parts[kClusterMax];
#pragma unroll
  for (int rank = 0; rank < kClusterMax; ++rank) parts[rank] = load_cluster_f32(map_shared(address, min(rank, last)));
#pragma unroll
  for (int rank = 1; rank < kClusterMax; ++rank) {
    if (rank <= last) parts[0] = combine<statistic>(parts[0], parts[rank]);
  }
  return parts[0];
}

__device__ __forceinline__ bool any_nonfinite(Shared& s) {
  uint32_t address = shared_address(&s.nonfinite);
  int any = 0;
  const int size = static_cast<int>(cluster_size());
  for (int rank = 0; rank < size; ++rank) any |= load_cluster_s32(map_shared(address, rank));
  return any != 0;
}

__device__ __forceinline__ int reduce_first(Shared& s, int which, int channel) {
  uint32_t address = shared_address(&s.first[which][channel]);
  int first = kNever;
  const int size = static_cast<int>(cluster_size());
  for (int rank = 0; rank < size; ++rank) first = min(first, load_cluster_s32(map_shared(address, rank)));
  return first;
}

}  // namespace sagert
