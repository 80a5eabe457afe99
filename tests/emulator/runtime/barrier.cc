// SPDX-License-Identifier: Apache-2.0
// bar.sync, bar.arrive and bar.red: the sixteen barriers of a block.
#include "block.h"

namespace emulator {
namespace {

void complete(Block& block, uint32_t id) {
  Barrier& barrier = block.barriers[id];
  barrier.result = barrier.ones;
  barrier.arrived = barrier.ones = barrier.expected = 0;
  for (auto& lane : block.lanes) {
    if (lane->state == State::kBarrier && lane->barrier == id) lane->state = State::kReady;
  }
  ++block.cluster->progress;
}

uint32_t present(const Block& block) {
  uint32_t count = 0;
  for (const auto& lane : block.lanes) count += lane->state != State::kDone;
  return count;
}

}  // namespace

uint32_t barrier(Thread& t, uint32_t site, uint32_t id, uint32_t threads, bool waits, Reduce reduce, bool predicate) {
  Lane& self = lane_of(t);
  Block& block = *self.block;
  if (id >= kBarriers) fail(t, site, "there is no barrier " + std::to_string(id));
  if (threads % kWarp != 0) fail(t, site, "a barrier for " + std::to_string(threads) + " threads, not whole warps");
  Barrier& barrier = block.barriers[id];
  const bool counts_zeros = reduce == Reduce::kAnd;
  // 0: all threads that there still are.
  if (barrier.arrived != 0 && barrier.expected != threads) {
    fail(t, site,
         "others expect " + std::to_string(barrier.expected) + " threads at barrier " + std::to_string(id) +
             ", this one " + std::to_string(threads));
  }
  barrier.expected = threads;
  ++barrier.arrived;
  barrier.ones += counts_zeros ? !predicate : predicate;
  self.barrier = id;
  if (barrier.arrived == (threads != 0 ? threads : present(block))) {
    complete(block, id);
  } else if (waits) {
    wait(self, State::kBarrier, site);
  }
  if (reduce == Reduce::kAnd) return barrier.result == 0;
  return reduce == Reduce::kOr ? barrier.result != 0 : barrier.result;
}

void leave_barriers(Lane& lane) {
  Block& block = *lane.block;
  for (uint32_t id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = block.barriers[id];
    if (barrier.arrived != 0 && barrier.expected == 0 && barrier.arrived == present(block)) complete(block, id);
  }
}

}  // namespace emulator
