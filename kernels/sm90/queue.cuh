// SPDX-License-Identifier: Apache-2.0
// Which tile comes next. Thread blocks take tiles from one counter in device memory: those that are done sooner take
// more. The producer takes a tile shortly before it is needed, so that as much as possible is known of who is ahead,
// and tells the scouts; they tell the consumers.
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

// Tells the scouts of the tile of a turn. The producer's warp calls it.
__device__ __forceinline__ void tell_tile(Shared& s, Ring<kTurns>& turns, int index) {
  mbarrier_wait(shared_address(&s.empty_tile[turns.stage]), turns.parity ^ 1);
  if (thread_index() % 32 == 0) {
    s.tiles[turns.stage] = index;
    mbarrier_arrive(shared_address(&s.full_tile[turns.stage]));
  }
  turns.advance();
}

// The tile of a turn, as the producer has told. A scout's warp calls it.
__device__ __forceinline__ int hear_tile(Shared& s, Ring<kTurns>& turns) {
  mbarrier_wait(shared_address(&s.full_tile[turns.stage]), turns.parity);
  const int index = static_cast<int>(uniform(s.tiles[turns.stage]));  // all lanes have read it
  mbarrier_arrive_once(shared_address(&s.empty_tile[turns.stage]));
  turns.advance();
  return index;
}

}  // namespace sagert
