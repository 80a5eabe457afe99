// SPDX-License-Identifier: Apache-2.0
// Who runs next. A thread runs until it waits for others: a warp does not run in step, so what needs bar.warp.sync and
// has none goes wrong here.
#include <algorithm>
#include <numeric>

#include "block.h"

namespace emulator {
namespace {

constexpr uint64_t kYieldsMax = 1 << 16;  // rounds in which threads only ask whether they still have to wait

std::string place_of(const Block& block, uint32_t lane) {
  const Lane& t = *block.lanes[lane];
  return "block (" + std::to_string(t.ctaid[0]) + ", " + std::to_string(t.ctaid[1]) + ", " +
         std::to_string(t.ctaid[2]) + "), warp " + std::to_string(t.warp) + ", lane " + std::to_string(t.lane);
}

const char* name_of(const Cluster& cluster, uint32_t site) { return cluster.launch->translation->sites[site]; }

void run_lane(void* argument) {
  Lane& lane = *static_cast<Lane*>(argument);
  lane.block->cluster->launch->kernel->run(lane);
  lane.state = State::kDone;
  ++lane.block->cluster->progress;
  leave_barriers(lane);
  leave(lane);
  for (;;) lane.fiber.pause();
}

void give_up(Thread& t, uint32_t site, const char* what, uint64_t value) {
  char text[32];
  snprintf(text, sizeof(text), " (0x%llx)", static_cast<unsigned long long>(value));
  fail(t, site, what + std::string(text));
}

}  // namespace

const Services kServices = {together,      barrier,         yield,         copy,           copy_commit,
                            copy_wait,     copy_wait_all,   remote,        give_up,        rounded,
                            mbarrier_init, mbarrier_arrive, mbarrier_test, bulk_load,      bulk_tensor,
                            bulk_store,    bulk_commit,     bulk_wait,     cluster_arrive, cluster_wait};

void fail(Thread& t, uint32_t site, const std::string& what) {
  Lane& lane = lane_of(t);
  Cluster& cluster = *lane.block->cluster;
  if (!cluster.failed) {
    cluster.failed = true;
    cluster.message = std::string(cluster.launch->kernel->name) + ", " +
                      place_of(*lane.block, t.warp * kWarp + t.lane) + ": " + what + " at " + name_of(cluster, site);
  }
  for (;;) cluster.current->fiber.pause();
}

void wait(Lane& lane, State state, uint32_t site) {
  lane.state = state;
  lane.site = site;
  lane.fiber.pause();
}

void yield(Thread& t, uint32_t site) { wait(lane_of(t), State::kYielded, site); }

void Cluster::prepare(uint64_t first) {
  const Kernel& kernel = *launch->kernel;
  const uint32_t threads = launch->block[0] * launch->block[1] * launch->block[2];
  const uint32_t end = kernel.dynamic_offset + launch->dynamic_bytes;
  while (blocks.size() < launch->cluster) blocks.push_back(std::make_unique<Block>());
  blocks.resize(launch->cluster);
  transfers.clear();
  cluster_arrived = 0;
  for (uint32_t rank = 0; rank < launch->cluster; ++rank) {
    Block& block = *blocks[rank];
    block.cluster = this;
    block.rank = rank;
    block.shared.assign(end, 0xff);  // NaN in every format
    std::fill(std::begin(block.barriers), std::end(block.barriers), Barrier());
    while (block.lanes.size() < threads) block.lanes.push_back(std::make_unique<Lane>());
    block.lanes.resize(threads);
    const uint64_t number = first + rank;
    for (uint32_t i = 0; i < threads; ++i) {
      Lane& lane = *block.lanes[i];
      Thread& t = lane;
      uint64_t rest = i, place = number;
      for (int axis = 0; axis < 3; ++axis) {
        t.ntid[axis] = launch->block[axis];
        t.nctaid[axis] = launch->grid[axis];
        t.tid[axis] = static_cast<uint32_t>(rest % t.ntid[axis]);
        t.ctaid[axis] = static_cast<uint32_t>(place % t.nctaid[axis]);
        rest /= t.ntid[axis];
        place /= t.nctaid[axis];
      }
      t.lane = i % kWarp;
      t.warp = i / kWarp;
      t.rank = rank;
      t.cluster_size = launch->cluster;
      t.shared = block.shared.data();
      t.shared_end = end;
      t.dynamic_bytes = launch->dynamic_bytes;
      t.clock = 0;
      t.parameters = launch->parameters;
      t.services = &kServices;
      lane.block = &block;
      lane.state = State::kReady;
      lane.copies.clear();
      lane.bulk_stores.clear();
      lane.fiber.start(run_lane, &lane);
    }
  }
}

// One turn of a warp: each of its lanes that can run does, until it waits. False when none could.
bool Cluster::run_warp(Block& block, uint32_t warp) {
  const uint32_t begin = warp * kWarp;
  const uint32_t count = std::min<uint32_t>(kWarp, static_cast<uint32_t>(block.lanes.size()) - begin);
  uint32_t order[kWarp];
  std::iota(order, order + count, 0);
  if (launch->seed != 0) std::shuffle(order, order + count, random);
  bool ran = false;
  for (uint32_t i = 0; i < count && !failed; ++i) {
    Lane& lane = *block.lanes[begin + order[i]];
    if (lane.state != State::kReady && lane.state != State::kYielded) continue;
    lane.state = State::kReady;
    current = &lane;
    lane.fiber.resume();
    ran = true;
  }
  return ran;
}

void Cluster::describe_deadlock(const char* kind) {
  failed = true;
  message = std::string(launch->kernel->name) + ": " + kind;
  int shown = 0;
  for (const auto& block : blocks) {
    for (uint32_t i = 0; i < block->lanes.size(); ++i) {
      const Lane& lane = *block->lanes[i];
      if (lane.state == State::kDone) continue;
      const bool same =
          i % kWarp != 0 && block->lanes[i - 1]->state == lane.state && block->lanes[i - 1]->site == lane.site;
      if (same || ++shown > 24) continue;
      message += "\n  " + place_of(*block, i) + " waits at " + name_of(*this, lane.site);
    }
  }
}

bool Cluster::run(const Launch& what, uint64_t first) {
  launch = &what;
  failed = false;
  message.clear();
  random.seed(what.seed + first);
  prepare(first);
  const uint32_t warps = (static_cast<uint32_t>(blocks[0]->lanes.size()) + kWarp - 1) / kWarp;
  std::vector<uint32_t> order(warps * blocks.size());
  std::iota(order.begin(), order.end(), 0);
  uint64_t idle = 0;
  for (;;) {
    const uint64_t before = progress;
    bool ran = false;
    if (what.seed != 0) std::shuffle(order.begin(), order.end(), random);
    for (uint32_t number : order) {
      Block& block = *blocks[number / warps];
      // A random number of turns: warps come to be far apart.
      uint32_t turns = what.seed != 0 ? static_cast<uint32_t>(random() % 64) : 1;
      while (!failed && run_warp(block, number % warps)) {
        ran = true;
        if (turns-- <= 1) break;
      }
    }
    if (failed) return false;
    if (!transfers.empty()) {
      finish_transfer(*this);
    } else if (!ran) {
      break;
    }
    idle = progress == before ? idle + 1 : 0;
    if (idle > kYieldsMax) {
      describe_deadlock("threads wait in loops, and nothing moves");
      return false;
    }
  }
  for (const auto& block : blocks) {
    for (const auto& lane : block->lanes) {
      if (lane->state == State::kDone) continue;
      describe_deadlock("deadlock");
      return false;
    }
  }
  return true;
}

}  // namespace emulator
