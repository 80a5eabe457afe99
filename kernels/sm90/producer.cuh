// SPDX-License-Identifier: Apache-2.0
// The producer: one warp that feeds the blocks of K and V.
#pragma once

#include "ptx/bulk.cuh"
#include "ptx/elect.cuh"
#include "tile.cuh"

namespace sagert {

// The ones behind every stage of V, which no copy touches. All threads of the block write them.
__device__ __forceinline__ void write_ones(Shared& s) {
  const uint32_t one = kV == V::kIo ? to_io2(1.f, 1.f) : 0x38383838;  // the latter in e4m3
  for (int stage = 0; stage < kStagesV; ++stage) {
    uint32_t* ones = reinterpret_cast<uint32_t*>(s.v[stage] + kVTileBytes);
    for (int i = threadIdx.x; i < kOnesBytes / 4; i += kThreads) ones[i] = one;
  }
  fence_async_shared();
}

// Starts the copy of a block of V, `block` of head `head_kv`, to a stage. One lane calls it.
__device__ __forceinline__ void load_v(const Params& p, int8_t* stage, int head_kv, int block, uint32_t full) {
  mbarrier_arrive_expect(full, kVTileBytes);
  if constexpr (kV == V::kIo) {
    const int heads = p.heads_q / p.group;
    for (int channel = 0; channel < kHeadDim; channel += kMapWidth) {
      bulk_load_tensor(shared_address(stage + channel * kBlock * 2), p.v_map, channel, block * kBlock, head_kv % heads,
                       head_kv / heads, full);
    }
  } else {
    bulk_load(shared_address(stage), p.v8 + (static_cast<int64_t>(head_kv) * p.blocks + block) * kTileBytes, kTileBytes,
              full);
  }
}

// Keeps the stages of K and V full. K runs one block ahead.
__device__ __forceinline__ void feed_keys(const Params& p, Shared& s) {
  Ring<kStages> k;
  Ring<kStagesV> v;
  for_each_tile(p, [&](int index, int) {
    const Tile tile = tile_at(p, index);
    const int head_kv = tile.head / p.group;
    const int blocks = tile.end - tile.begin;
#pragma unroll 1
    for (int step = 0; step <= blocks; ++step) {
      if (step < blocks) {
        int64_t block = static_cast<int64_t>(head_kv) * p.blocks + tile.end - 1 - step;
        mbarrier_wait(shared_address(&s.empty_k[k.stage]), k.parity ^ 1);
        if (elect_one()) {
          uint32_t full = shared_address(&s.full_k[k.stage]);
          mbarrier_arrive_expect(full, kTileBytes);
          bulk_load(shared_address(s.k[k.stage]), p.k8 + block * kTileBytes, kTileBytes, full);
        }
        k.advance();
      }
      if (step > 0) {
        mbarrier_wait(shared_address(&s.empty_v[v.stage]), v.parity ^ 1);
        if (elect_one()) load_v(p, s.v[v.stage], head_kv, tile.end - step, shared_address(&s.full_v[v.stage]));
        v.advance();
      }
    }
  });
}

}  // namespace sagert
