// SPDX-License-Identifier: Apache-2.0
// Copies of keys and values to the ring of stages. All threads of the block take part.
#pragma once

#include "tile.cuh"

namespace sagert {

struct Copies {
  const Params& p;
  const Shared& s;

  static constexpr int kVChunks = kVRowBytes / 16;       // of a row
  static constexpr int kVRows = kThreads / kVChunks;     // that the threads copy at a time
  static constexpr int kVPasses = kVTileBytes / 16 / kThreads;
  static constexpr int kKPasses = kKTileBytes / 16 / kThreads;
  static_assert(kVPasses * kThreads * 16 == kVTileBytes && kKPasses * kThreads * 16 == kKTileBytes, "uneven copies");

  static __device__ __forceinline__ int v_chunk() { return threadIdx.x % kVChunks; }
  static __device__ __forceinline__ int v_row() { return threadIdx.x / kVChunks; }

  // By one thread, before a barrier.
  static __device__ __forceinline__ void begin(const Params& p, Shared& s, const Tile& tile) {
    const int64_t head = tile.head / p.group, block = head * p.blocks;
    s.tile = tile;
    s.head_k = p.k8 + block * kBlock * kHeadDim;
    s.head_k_scale = p.k_scale + block * 4;
    if constexpr (kV == V::kIo) {
      const int heads_kv = p.heads_q / p.group;
      s.head_v = p.v + 2 * (head / heads_kv * p.v_sb + head % heads_kv * p.v_sh);
    } else {
      s.head_v = p.v + block * kBlock * kHeadDim;
    }
    if constexpr (kV == V::kInt8) s.head_v_scale = p.v_scale + block * kHeadDim;
  }

  __device__ __forceinline__ void copy_k(int step, int stage) const {
    const int8_t* from = s.head_k + static_cast<int64_t>(step) * kKTileBytes + threadIdx.x * 16;
    const uint32_t to = shared_address(s.k[0]) + stage * kKTileBytes + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kKPasses; ++i) async_copy16(to + i * kThreads * 16, from + i * kThreads * 16);
    if (threadIdx.x == 0) {
      async_copy16(shared_address(s.k_scale[0]) + stage * 16, s.head_k_scale + step * kStep / kBlock * 4);
    }
  }

  __device__ __forceinline__ void copy_v(int step, int stage) const {
    const uint32_t tile = shared_address(s.v[0]) + stage * kVTileBytes;
    if constexpr (kV == V::kIo) {
      // Chunks of 128 bytes of a row are swizzled by themselves: eight keys' chunks stand on different banks.
      const int c = v_chunk(), r = v_row();
      const uint32_t to = tile + r * kVRowBytes + c / 8 * 128 + (c % 8 ^ r % 8) * 16;
      const int first = step * kStep + r;
      const int64_t stride = 2 * p.v_ss;
      const int8_t* from = s.head_v + first * stride + c * 16;
      if ((step + 1) * kStep <= p.seqlen_k) {
#pragma unroll
        for (int i = 0; i < kVPasses; ++i) async_copy16(to + i * kVRows * kVRowBytes, from + i * kVRows * stride);
      } else {  // zeros behind the last key
#pragma unroll
        for (int i = 0; i < kVPasses; ++i) {
          const bool inside = first + i * kVRows < p.seqlen_k;
          async_copy16(to + i * kVRows * kVRowBytes, inside ? from + i * kVRows * stride : s.head_v, inside);
        }
      }
    } else {
      const int8_t* from = s.head_v + static_cast<int64_t>(step) * kVTileBytes + threadIdx.x * 16;
#pragma unroll
      for (int i = 0; i < kVPasses; ++i) {
        async_copy16(tile + threadIdx.x * 16 + i * kThreads * 16, from + i * kThreads * 16);
      }
      if constexpr (kV == V::kInt8) {
        if (threadIdx.x < kHeadDim / 8) {
          async_copy16(shared_address(s.v_scale[stage]) + threadIdx.x * 16,
                       s.head_v_scale + step * kHeadDim + threadIdx.x * 8);
        }
      }
    }
  }
};

}  // namespace sagert
