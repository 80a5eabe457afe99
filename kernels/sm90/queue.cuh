// SPDX-License-Identifier: Apache-2.0
// Which tile comes next. Thread blocks take tiles from one counter in device memory: those that are done sooner take
// more. The producer takes a tile shortly before it is needed, so that as much as possible is known of who is ahead,
// and tells the scouts; they tell the consumers.
//
// With sums in fp16 a thread block takes its tiles in rounds. Those whose sums have overflown are computed again, with
// sums in fp32, when a round ends, in the order they were taken.
#pragma once

#include "ptx/mbarrier.cuh"
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

// Tells the scouts of the tile of a turn and of its place in the round. The producer's warp calls it.
__device__ __forceinline__ void tell_tile(Shared& s, Ring<kTurns>& turns, int index, int place) {
  mbarrier_wait(shared_address(&s.empty_tile[turns.stage]), turns.parity ^ 1);
  __syncwarp();  // the answer to what one lane tells would start the barrier's next phase before others have seen this
  if (thread_index() % 32 == 0) {
    s.tiles[turns.stage] = index;
    if constexpr (kHalfSums) s.places[turns.stage] = place;
    mbarrier_arrive(shared_address(&s.full_tile[turns.stage]));
  }
  turns.advance();
}

// The tile of a turn, as the producer has told, and its place. A scout's warp calls it, and answer_tile() then.
__device__ __forceinline__ int hear_tile(const Shared& s, const Ring<kTurns>& turns, int& place) {
  mbarrier_wait(shared_address(&s.full_tile[turns.stage]), turns.parity);
  if constexpr (kHalfSums) place = static_cast<int>(uniform(s.places[turns.stage]));
  return static_cast<int>(uniform(s.tiles[turns.stage]));  // all lanes have read it
}

__device__ __forceinline__ void answer_tile(Shared& s, Ring<kTurns>& turns) {
  mbarrier_arrive_once(shared_address(&s.empty_tile[turns.stage]));
  turns.advance();
}

// The scouts have answered what was told last: of the end of a round they do when their consumers have come to it.
__device__ __forceinline__ void wait_for_answers(const Shared& s, Ring<kTurns> turns) {
  turns.retreat();
  mbarrier_wait(shared_address(&s.empty_tile[turns.stage]), turns.parity);
}

// The sums of the tile in this place of the round have overflown. All lanes of a warp call it.
__device__ __forceinline__ void tell_overflow(Shared& s, int place) {
  if (thread_index() % 32 != 0) return;
  atomicOr(&s.overflown[place / 32], 1u << place % 32);
  s.has_overflown = 1;
}

// Calls `f` for the tiles of the round to be computed again. The producer's warp calls it, when the consumers have
// ended the round.
template <typename F>
__device__ __forceinline__ void for_each_overflown(const Shared& s, F f) {
  if (uniform(s.has_overflown) == 0) return;
#pragma unroll 1
  for (int place = 0; place < kRoundTiles; ++place) {
    const bool again = uniform(s.overflown[place / 32]) >> place % 32 & 1;
    if (again) f(static_cast<int>(uniform(s.taken[place])));
  }
}

// For the next round. One warp calls it.
__device__ __forceinline__ void clear_overflown(Shared& s) {
  const int lane = thread_index() % 32;
  if (lane < kRoundTiles / 32) s.overflown[lane] = 0;
  if (lane == 0) s.has_overflown = 0;
  __syncwarp();
}

}  // namespace sagert
