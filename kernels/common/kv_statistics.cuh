// SPDX-License-Identifier: Apache-2.0
// Pre-passes, first reading of K and V: column statistics of a run of keys, by all threads of a block.
//
// `Shared` is the kernel's shared memory. It has partial[kWarps][stats][kHeadDim], stats[][kHeadDim] (float), and
// first[2][kHeadDim] and nonfinite (int): the first key of each channel that is +inf or NaN, and -inf or NaN, of use
// where `nonfinite` is set.
#pragma once

#include "kv_rows.cuh"

namespace sagert {

// Column statistics in their order: sum, sum of squares, minimum, maximum. A kernel needs the first few.
enum Statistic { kSum, kSquares, kMin, kMax };
constexpr int kStatsMax = 4;

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
  template <typename Shared>
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

template <int statistic, typename Shared>
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

template <int stats, int statistic = 0, typename Shared>
__device__ __forceinline__ void publish_columns(Shared& s, const Columns<stats>& columns) {
  if constexpr (statistic < stats) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = columns.get(statistic, i);
    publish_warp<statistic>(s, x);
    publish_columns<stats, statistic + 1>(s, columns);
  }
}

// The block's statistic of one channel.
template <int stats, int statistic = 0, typename Shared>
__device__ __forceinline__ void reduce_warps(Shared& s, int channel) {
  if constexpr (statistic < stats) {
    float x = s.partial[0][statistic][channel];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x = combine<statistic>(x, s.partial[warp][statistic][channel]);
    s.stats[statistic][channel] = x;
    reduce_warps<stats, statistic + 1>(s, channel);
  }
}

// The block's statistics in s.stats. False where there is an infinity, a NaN, or a sum beyond fp32: then they are to be
// taken again, of what is finite.
template <int stats, typename Shared>
__device__ __forceinline__ bool reduce_columns(Shared& s, const Columns<stats>& columns) {
  publish_columns(s, columns);
  if (threadIdx.x == 0) s.nonfinite = 0;
  __syncthreads();
  bool overflow = false;
  if (threadIdx.x < kHeadDim) {
    reduce_warps<stats>(s, threadIdx.x);
    s.first[0][threadIdx.x] = s.first[1][threadIdx.x] = kNever;
    overflow = !is_finite(s.stats[kSum][threadIdx.x]);
  }
  return !__syncthreads_or(overflow);
}

template <int stats, typename Shared>
__device__ __forceinline__ void reduce_finite_columns(Shared& s, const Columns<stats>& columns) {
  publish_columns(s, columns);
  __syncthreads();
  if (threadIdx.x < kHeadDim) reduce_warps<stats>(s, threadIdx.x);
}

// Statistics of rows [row, end) in s.stats, s.first and s.nonfinite. The caller synchronizes before reading them.
// Two groups of kLoads loads are in flight: one is reloaded while the other is added.
template <int stats, int kLoads = 4, typename Shared>
__device__ __forceinline__ void column_statistics(Shared& s, const Input& in, int row, int end) {
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
  if (reduce_columns(s, columns)) return;

  columns.clear();
#pragma unroll 1
  for (r = row + thread_row; r < end; r += kRowsPerPass) {
    uint32_t single[1][4];
    load_rows(single, part, r, kRowsPerPass, channel);
    columns.add_finite(single[0], s, r, channel);
  }
  reduce_finite_columns(s, columns);
}

// The keys whose mean is subtracted of K: any vector may be, it adds the same to all scores of a query. From
// 2 * kSampled keys on it is one of each `stride`, where a hash says, so that no period of the keys meets theirs.
struct Sample {
  static constexpr int kSampled = 512;
  int stride, count;

  __device__ __forceinline__ explicit Sample(int keys) : stride(max(keys / kSampled, 1)), count(keys / stride) {}
  __device__ __forceinline__ int key(int i) const {
    uint32_t hash = static_cast<uint32_t>(i) * 0x9e3779b1u;
    hash = (hash ^ hash >> 15) * 0x85ebca6bu;
    return i * stride + static_cast<int>(__umulhi(hash ^ hash >> 13, stride));
  }
  // What falls to part `part` of `parts`.
  __device__ __forceinline__ int begin(int part, int parts) const {
    return static_cast<int>(static_cast<int64_t>(count) * part / parts);
  }
};

// Sums over the keys first, first + 1, ... of a sample, up to `last`, in s.stats. kLoads loads are in flight.
template <int kLoads = 4, typename Shared>
__device__ __forceinline__ void sample_sums(Shared& s, const Input& in, const Sample& sample, int first, int last) {
  const int channel = 8 * (threadIdx.x % kChunks);
  first += threadIdx.x / kChunks;
  Columns<1> columns;
  auto load = [&](uint32_t (&x)[1][4], int i) { load_rows(x, in, i < last ? sample.key(i) : in.rows, 1, channel); };
  columns.clear();
#pragma unroll 1
  for (int i = first; i < last; i += kLoads * kRowsPerPass) {
    uint32_t x[kLoads][1][4];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) load(x[n], i + n * kRowsPerPass);
#pragma unroll
    for (int n = 0; n < kLoads; ++n) columns.add(x[n][0]);
  }
  if (reduce_columns(s, columns)) return;

  columns.clear();
#pragma unroll 1
  for (int i = first; i < last; i += kRowsPerPass) {
    uint32_t x[1][4];
    load(x, i);
    columns.add_finite(x[0], s, i, channel);
  }
  reduce_finite_columns(s, columns);
}

// What is subtracted of a channel of V with this mean and this mean square: the mean where that pays, which is where
// mean^2 >= variance / 4, with variance = square - mean^2.
__device__ __forceinline__ float v_shift(float mean, float square) {
  return 5.0f * mean * mean >= square && fabsf(mean) < kShiftMax ? mean : 0.0f;
}

// The unit of a channel of V whose mean and mean square are these: its deviation from `shift`. Any positive number
// would do; below the shift's own rounding, and where squares overflow, the deviation is not known.
__device__ __forceinline__ float v_unit(float mean, float square, float shift) {
  constexpr float kLeast = 1e-10f, kMost = 1e18f;
  const float variance = fmaxf(square - shift * (2.0f * mean - shift), 0.0f);
  return fminf(fmaxf(sqrtf(variance), fmaxf(fabsf(shift) * 0x1p-10f, kLeast)), kMost);
}

}  // namespace sagert
