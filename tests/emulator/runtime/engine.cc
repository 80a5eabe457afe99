// SPDX-License-Identifier: Apache-2.0
// mbarriers, the copy engine, and the barrier of a cluster. Transfers end one at a time, after every warp has had a
// turn; copies out of shared memory read it as late as the wait for them.
#include <cstring>

#include "block.h"

namespace emulator {
namespace {

// An mbarrier's 64 bits.
struct Phase {
  uint16_t pending, count;
  int32_t bytes;  // twice the transfers' bytes that are still to come, and the phase's parity in the lowest bit
};
static_assert(sizeof(Phase) == 8, "an mbarrier has 64 bits");

void settle(Cluster& cluster, uint8_t* place, Phase phase) {
  if (phase.pending == 0 && phase.bytes >> 1 == 0) {
    phase.pending = phase.count;
    phase.bytes ^= 1;
    ++cluster.progress;
  }
  store<Phase>(place, phase);
}

void copy_pieces(const std::vector<Copy>& pieces) {
  for (const Copy& piece : pieces) {
    std::memcpy(piece.to, piece.from, piece.source_bytes);
    std::memset(piece.to + piece.source_bytes, 0, piece.bytes - piece.source_bytes);
  }
}

// `bytes` of shared memory, all inside.
uint8_t* region(Thread& t, uint32_t site, uint32_t address, uint32_t bytes) {
  uint8_t* first = shared_at(t, site, address, 16);
  if (bytes % 16 != 0) fail(t, site, "a bulk copy that is not a multiple of 16 bytes");
  if (bytes != 0) shared_at(t, site, address + bytes - 16, 16);
  return first;
}

}  // namespace

void mbarrier_init(Thread& t, uint32_t site, uint32_t barrier, uint32_t count) {
  store<Phase>(shared_at(t, site, barrier, 8), {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0});
}

void mbarrier_arrive(Thread& t, uint32_t site, uint32_t barrier, uint32_t count, uint32_t expected_bytes) {
  uint8_t* place = shared_at(t, site, barrier, 8);
  Phase phase = load<Phase>(place);
  if (phase.pending < count) fail(t, site, "more arrive at an mbarrier than it counts");
  phase.pending = static_cast<uint16_t>(phase.pending - count);
  phase.bytes += static_cast<int32_t>(2 * expected_bytes);
  settle(*lane_of(t).block->cluster, place, phase);
}

bool mbarrier_test(Thread& t, uint32_t site, uint32_t barrier, uint32_t parity, bool waits) {
  uint8_t* place = shared_at(t, site, barrier, 8);
  auto done = [&] { return (load<Phase>(place).bytes & 1) != static_cast<int32_t>(parity & 1); };
  if (!done() && waits) yield(t, site);
  return done();
}

void bulk_load(Thread& t, uint32_t site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier) {
  uint8_t* place = region(t, site, to, bytes);
  if (from % 16 != 0) fail(t, site, "a bulk copy from an address that is not a multiple of 16");
  std::memset(place, 0xff, bytes);
  lane_of(t).block->cluster->transfers.push_back(
      {{{place, reinterpret_cast<const uint8_t*>(from), bytes, bytes}}, shared_at(t, site, barrier, 8), bytes});
}

void bulk_tensor(Thread& t, uint32_t site, uint32_t to, uint64_t from, const int32_t* place, uint32_t barrier) {
  const TensorMap map = load<TensorMap>(reinterpret_cast<const uint8_t*>(from));
  const uint32_t line = map.box[0] * map.element_bytes, lines = uint32_t{map.box[1]} * map.box[2] * map.box[3];
  if (line % 16 != 0 || (map.swizzle != 0 && line > 16u << map.swizzle)) fail(t, site, "a box of unknown form");
  uint8_t* base = region(t, site, to, line * lines);
  std::memset(base, 0xff, line * lines);
  Transfer transfer = {{}, shared_at(t, site, barrier, 8), line * lines};
  for (uint32_t i = 0; i < lines; ++i) {
    const int64_t at[4] = {place[0], int64_t{place[1]} + i % map.box[1],
                           int64_t{place[2]} + i / map.box[1] % map.box[2],
                           int64_t{place[3]} + i / map.box[1] / map.box[2]};
    bool inside = true;
    int64_t offset = 0;
    for (int axis = 1; axis < 4; ++axis) {
      inside = inside && at[axis] >= 0 && at[axis] < map.sizes[axis];
      offset += at[axis] * static_cast<int64_t>(map.strides[axis - 1]);
    }
    for (uint32_t byte = 0; byte < line; byte += 16) {
      const int64_t first = at[0] * map.element_bytes + byte, end = int64_t{map.sizes[0]} * map.element_bytes;
      if (first < 0 && inside) fail(t, site, "a box that begins before the tensor");
      const int64_t left = inside ? end - first : 0;
      const uint32_t linear = static_cast<uint32_t>(to) + i * line + byte;
      const uint32_t mask = (1u << map.swizzle) - 1;
      const uint32_t swizzled = linear ^ (linear >> 7 & mask) << 4;
      const uint32_t source_bytes = left >= 16 ? 16 : left > 0 ? static_cast<uint32_t>(left) : 0;
      transfer.pieces.push_back({base + static_cast<int32_t>(swizzled - to),
                                 reinterpret_cast<const uint8_t*>(map.address) + offset + first, 16, source_bytes});
    }
  }
  lane_of(t).block->cluster->transfers.push_back(std::move(transfer));
}

void finish_transfer(Cluster& cluster) {
  const Transfer transfer = std::move(cluster.transfers.front());
  cluster.transfers.pop_front();
  copy_pieces(transfer.pieces);
  Phase phase = load<Phase>(transfer.barrier);
  phase.bytes -= static_cast<int32_t>(2 * transfer.bytes);
  settle(cluster, transfer.barrier, phase);
  ++cluster.progress;
}

void bulk_store(Thread& t, uint32_t site, uint64_t to, uint32_t from, uint32_t bytes) {
  const uint8_t* place = region(t, site, from, bytes);
  if (to % 16 != 0) fail(t, site, "a bulk copy to an address that is not a multiple of 16");
  lane_of(t).bulk_stores.open.push_back({reinterpret_cast<uint8_t*>(to), place, bytes, bytes});
}

void bulk_commit(Thread& t) { lane_of(t).bulk_stores.commit(); }

void bulk_wait(Thread& t, uint32_t groups) { lane_of(t).bulk_stores.wait(groups, copy_pieces); }

namespace {

void turn_cluster(Cluster& cluster) {
  uint32_t present = 0;
  for (const auto& block : cluster.blocks) {
    for (const auto& lane : block->lanes) present += lane->state != State::kDone;
  }
  if (cluster.cluster_arrived < present || present == 0) return;
  cluster.cluster_arrived = 0;
  ++cluster.cluster_turn;
  ++cluster.progress;
  for (const auto& block : cluster.blocks) {
    for (const auto& lane : block->lanes) {
      if (lane->state == State::kCluster) lane->state = State::kReady;
    }
  }
}

}  // namespace

void cluster_arrive(Thread& t, uint32_t) {
  Cluster& cluster = *lane_of(t).block->cluster;
  lane_of(t).cluster_turn = cluster.cluster_turn;
  ++cluster.cluster_arrived;
  turn_cluster(cluster);
}

void cluster_wait(Thread& t, uint32_t site) {
  Lane& lane = lane_of(t);
  if (lane.cluster_turn == lane.block->cluster->cluster_turn) wait(lane, State::kCluster, site);
}

void leave(Lane& lane) {
  lane.bulk_stores.commit();
  lane.bulk_stores.wait(0, copy_pieces);
  if (lane.block->cluster->cluster_arrived != 0) turn_cluster(*lane.block->cluster);
}

}  // namespace emulator
