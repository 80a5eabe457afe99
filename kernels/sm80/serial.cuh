// SPDX-License-Identifier: Apache-2.0
// The loop over the keys of schedules in which a warp takes one step after the other; the block's other warps, and the
// multiprocessor's other blocks, compute while it waits. A stage holds the keys and the values of a step.
#pragma once

#include "nonfinite.cuh"
#include "ptx/named_barrier.cuh"
#include "warp.cuh"

namespace sagert {

// `Schedule` has attend_step(step, slot), which calls copy_next(), and may have start() and finish().
template <typename Schedule>
struct SerialWarp : Warp {
  using Warp::Warp;

  __device__ __forceinline__ Copies copies() const {
    int thread = threadIdx.x;
    forget(thread);  // what depends on it would take registers over all steps
    return {p, base, static_cast<unsigned>(thread)};
  }

  // Of the step that comes kAhead later.
  __device__ __forceinline__ void copy_next(int step, int slot) {
    copies().copy<false>(step - kAhead, slot + kAhead * kNextSlot);
    async_copy_commit();
  }

  // No step to come moves a maximum or needs a mask: that stands in a bit of the slot which nothing else looks at, so
  // that it takes no register. All lanes agree: as a vote the compiler knows.
  static constexpr int kSettled = 1 << 29;
  static __device__ __forceinline__ bool is_settled(int slot) { return kBounded && __all_sync(~0u, slot >= kSettled); }

  // The step of a slot, where a register for it is missing.
  __device__ __forceinline__ int step_of(int slot) const {
    static_assert(!kEvenV || (kNextSlot == 1 && !kUnseenApart), "slots count up from the tile's last step");
    return load_shared_s32(SAGERT_AT(base, tile.steps)) - 1 - slot;
  }

  // Waits for the block's other warps, each in the loop it has come to: __syncthreads asks them to be in the same one.
  static __device__ __forceinline__ void meet() {
    if constexpr (kUnseenApart || kApart) {
      named_barrier_anywhere(1, kThreads);
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ void start(int) {}
  __device__ __forceinline__ void finish() {}

  __device__ __forceinline__ void attend() {
    if (threadIdx.x == 0) Copies::begin(p, s, tile_at(p, blockIdx.x));
    __syncthreads();
    if constexpr (kKeepPlaces) {
      Copies::keep_places(p, s, k_lane_at(SAGERT_AT(base, k)), v_lane_at(SAGERT_AT(base, v)));
    }
    float scale[kR];
    if (p.q_vec) {
      prefetch_queries();
    } else {
      stage_all(scale);
    }
    int step = s.tile.steps - 1, slot = kNextSlot < 0 ? step : 0;
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) {
      copies().copy<true>(step - i, slot + i * kNextSlot);
      async_copy_commit();
    }
    begin(scale);
    place();
    const bool v_bad = kV == V::kIo && is_bad(1);
    store_shared(SAGERT_AT(base, maximum) + threadIdx.x / 4 * (4 * kR), b);
    if constexpr (kEvenV) {
      constexpr float kNone[kR] = {};
      store_shared(sums(), sum);
      if (threadIdx.x < 4) store_shared_f32(base + kMagicAt + 4 * threadIdx.x, kRound);  // before the loop's barrier
      store_shared(offsets(), kNone);
    }
    __syncwarp();
    Schedule& schedule = *static_cast<Schedule*>(this);
    schedule.start(slot);
    auto wait = [&] {
      async_copy_wait_group<kAhead - 1>();
      meet();
      if (v_bad) {
        clear_nonfinite(s, slot);
        meet();
      }
    };
    // Steps that only other warps see; all that follow are this one's, too.
#pragma unroll 1
    for (; kUnseenApart && step >= 0 && !sees(step); --step, slot += kNextSlot) {
      wait();
      copy_next(step, slot);
    }
#pragma unroll 1
    for (; step >= 0 && !(kApart && is_settled(slot)); --step, slot += kNextSlot) {
      wait();
      if (kUnseenApart || sees(step)) {
        schedule.attend_step(step, slot);
      } else {
        copy_next(step, slot);
      }
    }
    if constexpr (kApart) {
#pragma unroll 1
      for (; step >= 0; --step, slot += kNextSlot) {
        async_copy_wait_group<kAhead - 1>();
        meet();
        schedule.template attend_step<true>(step, slot);
      }
    }
    async_copy_wait_group<0>();
    schedule.finish();
    load_shared(b, SAGERT_AT(base, maximum) + threadIdx.x / 4 * (4 * kR));
    if constexpr (kEvenV) load_shared(sum, sums());
    write();
  }
};

}  // namespace sagert
