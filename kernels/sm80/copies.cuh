// SPDX-License-Identifier: Apache-2.0
// Copies of keys and values to the ring of stages. All threads of the block take part.
#pragma once

#include "tile.cuh"

namespace sagert {

struct Copies {
  const Params& p;
  const uint32_t base;  // of shared memory
  const unsigned thread;

  static constexpr int kVChunks = kVRowBytes / 16;       // of a row
  static constexpr int kVRows = kThreads / kVChunks;     // that the threads copy at a time
  static constexpr int kVPasses = kVTileBytes / 16 / kThreads;
  static constexpr int kKPasses = kKTileBytes / 16 / kThreads;
  static_assert(kVPasses * kThreads * 16 == kVTileBytes && kKPasses * kThreads * 16 == kKTileBytes, "uneven copies");

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

  // Any step: keys of `step`, or zeros in front of the first one.
  __device__ __forceinline__ void copy_k(int step, int stage) const {
    const int8_t* from = load_shared_pointer<int8_t>(SAGERT_AT(base, head_k)) + static_cast<int64_t>(step) * kKTileBytes + thread * 16;
    const uint32_t to = SAGERT_AT(base, k) + stage * kKTileBytes + thread * 16;
    const bool inside = step >= 0;
#pragma unroll
    for (int i = 0; i < kKPasses; ++i) async_copy16(to + i * kThreads * 16, from + i * kThreads * 16, inside);
  }

  // Values of `step`; zeros behind the last key and in front of the first one.
  __device__ __forceinline__ void copy_v(int step, int stage) const {
    const uint32_t tile = SAGERT_AT(base, v) + stage * kVTileBytes;
    if constexpr (kV == V::kIo) {
      // Chunks of 128 bytes of a row are swizzled by themselves: eight keys' chunks stand on different banks.
      const unsigned c = thread % kVChunks, r = thread / kVChunks;
      const uint32_t to = tile + r * kVRowBytes + c / 8 * 128 + (c % 8 ^ r % 8) * 16;
      const int first = step * kStep + r;
      const int64_t stride = 2 * p.v_ss;
      const int8_t* from = load_shared_pointer<int8_t>(SAGERT_AT(base, head_v)) + step * kStep * stride + (r * stride + c * 16);
#pragma unroll
      for (int i = 0; i < kVPasses; ++i) {
        const bool inside = static_cast<unsigned>(first + i * kVRows) < static_cast<unsigned>(p.seqlen_k);
        async_copy16(to + i * kVRows * kVRowBytes, from + i * kVRows * stride, inside);
      }
    } else {
      const int8_t* from = load_shared_pointer<int8_t>(SAGERT_AT(base, head_v)) + static_cast<int64_t>(step) * kVTileBytes + thread * 16;
      const bool inside = step >= 0 && step * kStep < p.blocks * kBlock;
#pragma unroll
      for (int i = 0; i < kVPasses; ++i) {
        async_copy16(tile + thread * 16 + i * kThreads * 16, from + i * kThreads * 16, inside);
      }
      if constexpr (kV == V::kInt8) copy_v_scale(step, stage, inside);
    }
  }

  // Steps all of whose keys are there, to `stage`; nothing in front of the first one.
  __device__ __forceinline__ void copy(int k_step, int v_step, int stage) const {
    const bool k_inside = k_step >= 0, v_inside = v_step >= 0;
    const int8_t* k = load_shared_pointer<int8_t>(SAGERT_AT(base, head_k)) +
                      static_cast<int64_t>(k_step) * kKTileBytes + thread * 16;
    const int8_t* v = load_shared_pointer<int8_t>(SAGERT_AT(base, head_v));
    const uint32_t k_to = SAGERT_AT(base, k) + stage * kKTileBytes + thread * 16;
#pragma unroll
    for (int i = 0; i < kKPasses; ++i) async_copy16(k_to + i * kThreads * 16, k + i * kThreads * 16, k_inside);
    const uint32_t v_tile = SAGERT_AT(base, v) + stage * kVTileBytes;
    if constexpr (kV == V::kIo) {
      const unsigned c = thread % kVChunks, r = thread / kVChunks;
      const uint32_t to = v_tile + r * kVRowBytes + c / 8 * 128 + (c % 8 ^ r % 8) * 16;
      const uint32_t stride = 2 * static_cast<uint32_t>(p.v_ss);  // the host copies V whose rows are further apart
      v += static_cast<uint64_t>(v_step * kStep + r) * stride + c * 16;
#pragma unroll
      for (int i = 0; i < kVPasses; ++i) {
        async_copy16(to + i * kVRows * kVRowBytes, v, v_inside);
        v += kVRows * stride;
        forget(v);  // one addition each, not a product
      }
    } else {
      v += static_cast<int64_t>(v_step) * kVTileBytes + thread * 16;
#pragma unroll
      for (int i = 0; i < kVPasses; ++i) {
        async_copy16(v_tile + thread * 16 + i * kThreads * 16, v + i * kThreads * 16, v_inside);
      }
      if constexpr (kV == V::kInt8) copy_v_scale(v_step, stage, v_inside);
    }
  }

  // Scales of a step's values, 16 bytes a thread.
  __device__ __forceinline__ void copy_v_scale(int step, int stage, bool inside) const {
    if (thread < kHeadDim / 8) {
      async_copy16(SAGERT_AT(base, v_scale) + stage * kHeadDim * 2 + thread * 16,
                   load_shared_pointer<VScaleType>(SAGERT_AT(base, head_v_scale)) + step * kHeadDim + thread * 8, inside);
    }
  }
};

}  // namespace sagert
