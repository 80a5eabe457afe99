// SPDX-License-Identifier: Apache-2.0
// Which tile comes next. Thread blocks take tiles from one counter in device memory: those that are done sooner take
// more. The producer takes a tile shortly before it is needed, so that as much as possible is known of who is ahead,
// and tells the scouts; they tell the consumers.
//
// With sums in fp16 a thread block takes its tiles in rounds. Those whose sums have overflown are computed again, with
// sums in fp32, when a round ends, in the order they were taken: the second phase of the round.
#pragma once

#include "ptx/mbarrier.cuh"
#include "ptx/named_barrier.cuh"
#include "tile.cuh"

namespace sagert {

__device__ __forceinline__ int count_of_tiles(const Params& p) { return p.tiles * p.heads_total; }

// The tile behind tile `index` of this thread block. All lanes of a warp call it.
__device__ __forceinline__ int take_tile(const Params& p, int index) {
  if (p.next_tile == nullptr) return index + grid_width();
  int taken = 0;
  if (thread_index() % 32 == 0) taken = atomicAdd(p.next_tile, 1);
  return grid_width() + __shfl_sync(~0u, taken, 0);
}

constexpr int kNoTile = -1;   // told in place of a tile where a phase ends
constexpr int kNoPhase = -2;  // where no more begins

// Tells the scouts of the tile of a turn. The producer's warp calls it.
__device__ __forceinline__ void tell_tile(Shared& s, Ring<kTurns>& turns, int index, Phase phase = kFirst) {
  mbarrier_wait(shared_address(&s.empty_tile[turns.stage]), turns.parity ^ 1);
  if (thread_index() % 32 == 0) {
    s.tiles[turns.stage] = index;
    if constexpr (kHalfSums) s.phases[turns.stage] = phase;
    mbarrier_arrive(shared_address(&s.full_tile[turns.stage]));
  }
  turns.advance();
}

// The tile of a turn, as the producer has told, and its phase. A scout's warp calls it.
__device__ __forceinline__ int hear_tile(Shared& s, Ring<kTurns>& turns, Phase& phase) {
  mbarrier_wait(shared_address(&s.full_tile[turns.stage]), turns.parity);
  const int index = static_cast<int>(uniform(s.tiles[turns.stage]));  // all lanes have read it
  if constexpr (kHalfSums) phase = static_cast<Phase>(uniform(s.phases[turns.stage]));
  mbarrier_arrive_once(shared_address(&s.empty_tile[turns.stage]));
  turns.advance();
  return index;
}

// The sums of the tile in this place of the round have overflown. All lanes of a warp call it.
__device__ __forceinline__ void tell_overflow(Shared& s, int place) {
  if (thread_index() % 32 != 0) return;
  atomicOr(&s.overflown[place / 32], 1u << place % 32);
  s.has_overflown = 1;
}

// The producer and the consumers come here at the end of a phase. Returns the one that follows.
__device__ __forceinline__ Phase end_phase(const Shared& s, Phase phase) {
  auto wait_for_all = [] { named_barrier(kGroups + 1, 128 * kGroups + 32); };
  wait_for_all();
  if (phase == kFirst && uniform(s.has_overflown) != 0) return kAgain;
  if (uniform(s.is_last_round) != 0) return kEnd;
  wait_for_all();  // what has been read above is not written earlier
  return kFirst;
}

// The tiles of the round to be computed again. All lanes of a warp call it.
template <typename F>
__device__ __forceinline__ void for_each_overflown(const Shared& s, F f) {
#pragma unroll 1
  for (int place = 0; place < kRoundTiles; ++place) {
    const bool again = uniform(s.overflown[place / 32]) >> place % 32 & 1;
    if (again) f(static_cast<int>(uniform(s.taken[place])));
  }
}

// For the next round.
__device__ __forceinline__ void clear_overflown(Shared& s) {
  if (thread_index() % 32 < kRoundTiles / 32) s.overflown[thread_index() % 32] = 0;
  s.has_overflown = 0;
}

}  // namespace sagert
