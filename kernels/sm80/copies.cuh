// SPDX-License-Identifier: Apache-2.0
// Copies of keys and values to the ring of stages. All threads of the block take part.
#pragma once

#include "tile.cuh"

namespace sagert {

__device__ __forceinline__ int stage_of(int slot) { return slot & (kStages - 1); }

// Where the last keys' values of a slot stand.
__device__ __forceinline__ uint32_t tail_at(uint32_t base, int slot) {
  return SAGERT_AT(base, v_tail) + (slot & (kTails - 1)) * kTailBytes;
}

// The same from the values of slot 0 on.
__device__ __forceinline__ uint32_t tail_behind(int slot) { return tail_at(0, slot) - SAGERT_AT(0, v); }

struct Copies {
  const Params& p;
  const uint32_t base;  // of shared memory
  const unsigned thread;

  // By one thread, before a barrier.
  static __device__ __forceinline__ void begin(const Params& p, Shared& s, const Tile& tile) {
    const int64_t head = tile.head / p.group, block = head * p.blocks;
    s.tile = tile;
    s.head_k = p.k8 + block * (kKTileBytes / kStepBlocks);
    if constexpr (kInt4) {
      const int64_t queries = static_cast<int64_t>(tile.head) * p.q_blocks + tile.row / p.q_block_rows;
      s.head_bias = p.bias + queries * p.blocks * kBlock;
    }
    s.head_k_scale = p.k_scale + block * 4;
    if constexpr (kRowsOfV) {
      const int heads_kv = p.heads_q / p.group;
      s.head_v = p.v + 2 * (head / heads_kv * p.v_sb + head % heads_kv * p.v_sh);
    } else {
      s.head_v = p.v + block * kBlock * kHeadDim;
    }
    if constexpr (kV == V::kInt8) s.head_v_scale = p.v_scale + block * kHeadDim;
  }

  // By every thread, behind that barrier. What the thread gives ldmatrix of the first stage's keys and values is kept
  // with the rest.
  static __device__ __forceinline__ void keep_places(const Params& p, Shared& s, uint32_t k_lane, uint32_t v_lane) {
    const unsigned thread = threadIdx.x;
    const uint32_t stride = 2 * static_cast<uint32_t>(p.v_ss);
    const auto k = reinterpret_cast<uint64_t>(s.head_k + thread * 16);
    const auto v = reinterpret_cast<uint64_t>(s.head_v + static_cast<uint64_t>(thread / kVChunks) * stride +
                                              thread % kVChunks * 16);
    Places& places = *reinterpret_cast<Places*>(reinterpret_cast<char*>(&s) + kPlacesAt);
    places.sources[thread] = make_uint4(static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32),
                                        static_cast<uint32_t>(v), static_cast<uint32_t>(v >> 32));
    places.targets[thread] =
        make_uint4(shared_address(s.k) + thread * 16, shared_address(s.v) + place_in_rows(thread), k_lane, v_lane);
  }

  // Keys, values and scales of `step` to its slot; zeros in front of the first step. The step may lack keys of 16-bit
  // V, or all of its second block, only where `ragged`: zeros then, too.
  template <bool ragged>
  __device__ __forceinline__ void copy(int step, int slot) const {
    const bool inside = step >= 0;
    const int stage = stage_of(slot);
    if constexpr (kKeepPlaces) {
      copy_from_places<ragged>(step, stage, slot);
      if constexpr (kInt4) copy_bias(step, stage, inside);
      return;
    }
    const int8_t* k = load_shared_pointer<int8_t>(SAGERT_AT(base, head_k)) + static_cast<int64_t>(step) * kKTileBytes;
    const bool whole = inside && (!ragged || kStepBlocks == 1 || (step + 1) * kStepBlocks <= p.blocks);
    copy_tile<kKTileBytes>(SAGERT_AT(base, k) + stage * kKTileBytes, k, inside, whole);
    const int8_t* v = load_shared_pointer<int8_t>(SAGERT_AT(base, head_v));
    const uint32_t v_tile = SAGERT_AT(base, v) + stage * kVTileBytes;
    if constexpr (kRowsOfV) {
      const uint32_t place = place_in_rows(thread);
      const uint32_t stride = 2 * static_cast<uint32_t>(p.v_ss);
      v += static_cast<uint64_t>(thread / kVChunks) * stride + thread % kVChunks * 16;
      copy_rows<ragged>(v_tile + place, tail_at(base, slot) + place, v, step);
    } else {
      copy_tile<kVTileBytes>(v_tile, v + static_cast<int64_t>(step) * kVTileBytes, inside, whole);
    }
    if constexpr (kV == V::kInt8) copy_v_scale(step, stage, inside);
    if constexpr (kInt4) copy_bias(step, stage, inside);
  }

  template <bool ragged>
  __device__ __forceinline__ void copy_from_places(int step, int stage, int slot) const {
    uint32_t source[4], target[4];
    load_shared(source, base + kPlacesAt + thread * 16);
    load_shared(target, base + kTargetsAt + thread * 16);
    auto pointer = [&](int i) {
      return reinterpret_cast<const int8_t*>(static_cast<uint64_t>(source[i + 1]) << 32 | source[i]);
    };
    static_assert(kStepBlocks == 1, "a step may lack its second block");
    copy_chunks<kKTileBytes>(target[0] + stage * kKTileBytes, pointer(0) + static_cast<int64_t>(step) * kKTileBytes,
                             step >= 0, step >= 0);
    copy_rows<ragged>(target[1] + stage * kVTileBytes, target[1] + tail_behind(slot), pointer(2), step);
  }

  // The first of a step's blocks is there where `inside`, all of them where `whole`.
  template <int bytes>
  __device__ __forceinline__ void copy_tile(uint32_t to, const int8_t* from, bool inside, bool whole) const {
    static_assert(bytes % (16 * kThreads * kStepBlocks) == 0, "uneven copies");
    copy_chunks<bytes>(to + thread * 16, from + thread * 16, inside, whole);
  }

  // The same from this thread's first place on.
  template <int bytes>
  static __device__ __forceinline__ void copy_chunks(uint32_t to, const int8_t* from, bool inside, bool whole) {
    constexpr int kCopies = bytes / (16 * kThreads);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      async_copy16(to + i * kThreads * 16, from + i * kThreads * 16, i < kCopies / kStepBlocks ? inside : whole);
    }
  }

  // Of V in rows: chunks of 16 bytes, and how many rows the threads copy at a time.
  static constexpr int kVChunks = kVRowBytes / 16, kRowsAtATime = kThreads / kVChunks;

  // Chunks of 128 bytes of a row are swizzled by themselves: eight keys' chunks stand on different banks.
  static __device__ __forceinline__ uint32_t place_in_rows(unsigned thread) {
    const unsigned c = thread % kVChunks, r = thread / kVChunks;
    return r * kVRowBytes + c / 8 * 128 + (c % 8 ^ r % 8) * 16;
  }

  // Rows of V of a step, from this thread's first one on, of step 0; the last keys go to `tail`.
  template <bool ragged>
  __device__ __forceinline__ void copy_rows(uint32_t to, uint32_t tail, const int8_t* from, int step) const {
    static_assert((kStep - kTailKeys) % kRowsAtATime == 0 && kRowsAtATime % 8 == 0, "uneven copies");
    const uint32_t stride = 2 * static_cast<uint32_t>(p.v_ss);  // the host copies V whose rows are 4 GiB apart
    from += static_cast<uint64_t>(static_cast<uint32_t>(step * kStep)) * stride;
#pragma unroll
    for (int row = 0; row < kStep; row += kRowsAtATime) {
      bool inside = step >= 0 && (kChannels == kHeadDim || thread % kVChunks * 8 < kChannels);
      if (ragged) inside = inside && step * kStep + static_cast<int>(thread / kVChunks) + row < p.seqlen_k;
      const int behind = row - (kStep - kTailKeys);
      async_copy16(behind < 0 ? to + row * kVRowBytes : tail + behind * kVRowBytes, from, inside);
      from += kRowsAtATime * stride;
      forget(from);  // one addition each, not a product
    }
  }

  // What a step's keys have with the mean that was taken off the queries, 16 bytes a thread.
  __device__ __forceinline__ void copy_bias(int step, int stage, bool inside) const {
    if (thread < kStep / 4) {
      const float* from = load_shared_pointer<float>(SAGERT_AT(base, head_bias)) + step * kStep;
      async_copy16(SAGERT_AT(base, bias) + (stage * kStep + thread * 4) * 4, from + thread * 4, inside);
    }
  }

  // Scales of a step's values, 16 bytes a thread.
  __device__ __forceinline__ void copy_v_scale(int step, int stage, bool inside) const {
    if (thread < kHeadDim / 8) {
      const VScaleType* scales = load_shared_pointer<VScaleType>(SAGERT_AT(base, head_v_scale));
      const VScaleType* from = scales + step * (kStepBlocks * kHeadDim);
      async_copy16(SAGERT_AT(base, v_scale) + (stage * kHeadDim + thread * 8) * 2, from + thread * 8, inside);
    }
  }
};

}  // namespace sagert
