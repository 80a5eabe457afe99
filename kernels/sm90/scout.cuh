// SPDX-License-Identifier: Apache-2.0
// A scout: one warp for each consumer warpgroup, a tile ahead of it. It works out what the group has to do there, which
// takes divisions, and has the group's queries copied to shared memory.
#pragma once

#include "ptx/async_copy.cuh"
#include "ptx/pdl.cuh"
#include "queries.cuh"
#include "queue.cuh"
#include "tile.cuh"

namespace sagert {

// The end of the steps that queries up to `row` + 63 see, were there no parts.
__device__ __forceinline__ int end_of_keys(const Params& p, int row) {
  const int all = count_of_steps(p);
  return kCausal ? min(all, (row + 63) / kStep + 1) : all;
}

// Of warpgroup `group` at a tile.
__device__ __forceinline__ int first_query(const Tile& tile, int group) {
  return tile.joint ? tile.row : tile.row + group * 64;
}

// What warpgroup `group` has to do at a tile.
__device__ __forceinline__ void write_task(const Params& p, const Tile& tile, int group, float k_norm, Task& task) {
  const int head_kv = tile.head / p.group, row = first_query(tile, group);
  const int2 flags = load_prerequisite(reinterpret_cast<const int2*>(p.head_flags) + head_kv);
  const int end_of_group = end_of_keys(p, row);
  int end = row < p.seqlen_q ? max(min(tile.end, end_of_group), tile.begin) : tile.begin;
  const bool ragged = kCausal ? end == end_of_group : end * kStep > p.seqlen_k;
  int masked = flags.x != 0 ? end - tile.begin : ragged ? 1 : 0;
  if (tile.joint) {
    end -= group;
    masked = max(masked - group + kGroups - 1, 0) / kGroups;
  }
  task.head = tile.head;
  task.head_kv = head_kv;
  task.row = row;
  task.skipped = tile.end - end;
  task.stride = tile.joint ? kGroups : 1;
  task.end = end;
  task.begin = tile.begin;
  task.masked = masked;
  task.k_norm = k_norm;
  if constexpr (kLeadingKeys != 0) task.has_leading = flags.x == 0;
  task.bad_keys = flags.x == 0 ? nullptr : p.k_bad + static_cast<int64_t>(head_kv) * p.blocks * 4;
  task.v_bad = kV == V::kIo ? 0 : flags.y;
  task.out = tile.head / p.heads_q * p.o_sb + tile.head % p.heads_q * p.o_sh + row * p.o_ss;
}

// Starts to copy 64 queries of a head, from `row` on, to `raw`; zeros stand for those there are not.
__device__ __forceinline__ void copy_queries(const Params& p, uint4* raw, int head, int row) {
  constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, in a row
  constexpr int kStep = 32 / kChunks;    // rows that the warp copies at a time
  constexpr int kStepBytes = 32 * 16;
  const int lane = thread_index() % 32, last = p.seqlen_q - row;
  const uint16_t* source = queries_of(p, head, row + lane / kChunks) + lane % kChunks * 8;
  uint32_t place = shared_address(raw + lane);
  if (last >= 64) {
#pragma unroll 4
    for (int r = 0; r < 64; r += kStep) {
      async_copy16(place, source);
      place += kStepBytes;
      source += kStep * p.q_ss;
    }
    return;
  }
#pragma unroll 1
  for (int r = lane / kChunks; r < 64; r += kStep) {
    async_copy16(place, r < last ? source : p.q, r < last);
    place += kStepBytes;
    source += kStep * p.q_ss;
  }
}

// Goes ahead of warpgroup `group`.
__device__ __forceinline__ void scout(const Params& p, Shared& s, int group) {
  const uint32_t full = shared_address(&s.full_q[group]);
  const bool writes = thread_index() % 32 == 0;
  const uint32_t empty = shared_address(&s.empty_q[group]);
  Ring<kTurns> turns;
  int place = 0;
  bool is_taken = false;     // the room for queries, by settled sums of the tile before
  uint32_t sums_parity = 0;  // of the phase in which these are
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int index = hear_tile(s, turns, place);
    if (!kHalfSums || index != kEndOfRound) answer_tile(s, turns);
    Task& task = s.tasks[group][turn & 1];
    // The group has read the queries of the tile before, and is done with the one before that.
    mbarrier_wait(empty, turn & 1 ^ 1);
    if (index < 0) {
      if (writes) task.head = index;
      mbarrier_arrive(full);
      if (writes) mbarrier_arrive(full);
      if (!kHalfSums || index == kEnd) return;
      mbarrier_wait(empty, turn & 1);
      answer_tile(s, turns);
      continue;
    }
    Tile tile = tile_at(p, index);
    if (place == kAgain) tile.joint = false;  // with sums in fp32
    if (is_taken) {
      mbarrier_wait(shared_address(&s.empty_sums[group]), sums_parity);
      sums_parity ^= 1;
    }
    if (p.q_vec) copy_queries(p, s.raw + group * 64 * (kHeadDim / 8), tile.head, first_query(tile, group));
    async_copy_arrive(full);
    wait_for_prerequisites();  // queries do not come from the pre-pass, the flags do
    float k_norm = 0.f;
    if constexpr (kBounded) k_norm = largest_norm(load_prerequisite(norm_slot(p.k_norm, tile.head / p.group)));
    if (writes) {
      write_task(p, tile, group, k_norm, task);
      task.set_round(place, task.end - task.begin);
      mbarrier_arrive(full);
    }
    is_taken = has_settled_sums(tile.end - tile.begin);
  }
}

}  // namespace sagert
