// SPDX-License-Identifier: Apache-2.0
// The producer: one warp that takes tiles and feeds their blocks of K and V.
#pragma once

#include "ptx/bulk.cuh"
#include "ptx/elect.cuh"
#include "ptx/pdl.cuh"
#include "queue.cuh"
#include "tile.cuh"

namespace sagert {

// The ones behind every stage of V, which no copy touches, in every other channel: a thread has two neighbouring ones.
// All threads of the block write them.
__device__ __forceinline__ void write_ones(Shared& s) {
  constexpr uint32_t kOneE4m3 = 0x38383838;
  for (int stage = 0; stage < kStages; ++stage) {
    for (int slot = 0; slot < kPieces; ++slot) {
      uint32_t* ones = reinterpret_cast<uint32_t*>(s.v[stage] + slot * kVSlotBytes + kVTileBytes);
      for (int i = threadIdx.x; i < kOnesBytes / 4; i += kThreads) {
        ones[i] = kV == V::kIo ? to_io2(1.f, 0.f) : i / (kBlock / 4) % 2 == 0 ? kOneE4m3 : 0;
      }
    }
  }
  fence_async_shared();
}

// Starts the copies of a step with half of a block beside the whole one. The last step may lack one of them: its keys
// are masked, and any finite values do.
__device__ __forceinline__ void load_pieces(const Params& p, Shared& s, int stage, int head_kv, int step) {
  const uint32_t full = shared_address(&s.full[stage]);
  const int64_t head = static_cast<int64_t>(head_kv) * p.blocks * kTileBytes;
  const int64_t whole = head + min(whole_block(step), p.blocks - 1) * static_cast<int64_t>(kTileBytes);
  const int64_t side = head + min(side_block(step), p.blocks - 1) * static_cast<int64_t>(kTileBytes);
  const int half = (step & 1) * kSide * kHeadDim;
  mbarrier_arrive_expect(full, kKStageBytes + 2 * kVTileBytes);
  bulk_load(shared_address(s.k[stage]), p.k8 + whole, kTileBytes, full);
  bulk_load(shared_address(s.k[stage] + kTileBytes), p.k8 + side + half, kSide * kHeadDim, full);
  bulk_load(shared_address(s.v[stage]), p.v8 + whole, kTileBytes, full);
  bulk_load(shared_address(s.v[stage] + kVSlotBytes), p.v8 + side, kTileBytes, full);
}

// Starts the copies of step `step` of head `head_kv` to a stage. One lane calls it.
__device__ __forceinline__ void load_step(const Params& p, Shared& s, int stage, int head_kv, int step) {
  if constexpr (kSide != 0) {
    load_pieces(p, s, stage, head_kv, step);
    return;
  }
  const uint32_t full = shared_address(&s.full[stage]);
  const int64_t place = (static_cast<int64_t>(head_kv) * p.blocks + step) * kTileBytes;
  mbarrier_arrive_expect(full, kTileBytes + kVTileBytes);
  bulk_load(shared_address(s.k[stage]), p.k8 + place, kTileBytes, full);
  if constexpr (kV == V::kIo) {
    const int heads = p.heads_q / p.group;
    for (int channel = 0; channel < kHeadDim; channel += kMapWidth) {
      bulk_load_tensor(shared_address(s.v[stage] + channel * kBlock * 2), p.v_map, channel, step * kBlock,
                       head_kv % heads, head_kv / heads, full);
    }
  } else {
    bulk_load(shared_address(s.v[stage]), p.v8 + place, kTileBytes, full);
  }
}

// Steps before the end of a tile at which the next one is taken: time for the scouts to have its queries copied.
constexpr int kLead = 4;

// Feeds the steps of tile `index`; calls `near_end` shortly before the last ones.
template <typename F>
__device__ __forceinline__ void feed_tile(const Params& p, Shared& s, Ring<kStages>& ring, int index, F near_end) {
  const Tile tile = tile_at(p, index);
  const int head_kv = tile.head / p.group;
  int step = tile.end - 1;
  auto feed = [&](int begin) {
#pragma unroll 1
    for (; step >= begin; --step) {
      mbarrier_wait(shared_address(&s.empty[ring.stage]), ring.parity ^ 1);
      if (elect_one()) load_step(p, s, ring.stage, head_kv, step);
      ring.advance();
    }
  };
  feed(tile.begin + kLead);
  near_end();
  feed(tile.begin);
}

// Keeps the stages full.
__device__ __forceinline__ void feed_keys(const Params& p, Shared& s) {
  Ring<kStages> ring;
  Ring<kTurns> turns;
  int index = blockIdx.x;
  tell_tile(s, turns, index, 0);
  wait_for_prerequisites();  // behind that: the scouts' first queries do not come from the pre-pass
#pragma unroll 1
  for (;;) {
    bool goes_on = true;  // the round does
#pragma unroll 1
    for (int place = 0; goes_on; ++place) {
      if (kHalfSums && elect_one()) s.taken[place] = index;
      feed_tile(p, s, ring, index, [&] {
        index = take_tile(p, index);
        goes_on = index < count_of_tiles(p) && (!kHalfSums || place + 1 < kRoundTiles);
        tell_tile(s, turns, goes_on ? index : kHalfSums ? kEndOfRound : kEnd, place + 1);
      });
    }
    if constexpr (!kHalfSums) return;
    wait_for_answers(s, turns);
    for_each_overflown(s, [&](int again) {
      tell_tile(s, turns, again, kAgain);
      feed_tile(p, s, ring, again, [] {});
    });
    if (index >= count_of_tiles(p)) {
      tell_tile(s, turns, kEnd, 0);
      return;
    }
    clear_overflown(s);
    tell_tile(s, turns, index, 0);
  }
}

}  // namespace sagert
