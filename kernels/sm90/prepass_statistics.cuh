// SPDX-License-Identifier: Apache-2.0
// Pre-pass, phase 1: shared memory, and sums of column statistics over the cluster.
#pragma once

#include "kv_statistics.cuh"
#include "kv_tiles.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"

#ifndef CLUSTER
#define CLUSTER 8
#endif

namespace sagert {

constexpr int kClusterMax = CLUSTER;
constexpr int kVStats = !kQuantizedV ? 1 : kInt8V ? 2 : 4;
constexpr int kVLoadsAtATime = kVStats == 1 ? 8 : 4;  // the other statistics take the registers
constexpr int kSampleLoads = kQuantizedV ? 4 : 6;     // at a time: with quantized V registers are short

struct alignas(128) Shared {
  union {
    uint8_t tile[2][kTileBytes];
    float partial[kWarps][kStatsMax][kHeadDim];
  };
  float shift[kHeadDim], inverse[kHeadDim];  // kInt8V: units of the channels in place of the inverse scales
  float v_amax[kInt8V ? 2 : 1][kInt8V ? kWarps : 1][kHeadDim];
  uint32_t k_amax[2][kWarps], k_bad[2][kWarps];
  int head_nonfinite;
  uint32_t norm;  // bits, of this block's keys
  int* bad_keys;  // of the head: one holds an infinity or a NaN. It stands here because registers are short
  int64_t channel_stride;
  // Read by the whole cluster.
  int nonfinite;
  int first[2][kHeadDim];  // first key that is +inf or NaN, -inf or NaN; of use where `nonfinite` is set
  float stats[kStatsMax][kHeadDim];
};

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
