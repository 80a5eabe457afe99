// SPDX-License-Identifier: Apache-2.0
// cp.async. The device may write at any time between the start of a copy and the end of the wait for it: here poison
// comes at the start, so that a place still in use shows, and the data at the wait, so that a missing wait shows.
#include <cstring>

#include "block.h"

namespace emulator {
namespace {

void carry_out(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memcpy(copy.to, copy.from, copy.source_bytes);
    std::memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
}

}  // namespace

void copy(Thread& t, uint32_t site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes) {
  uint8_t* place = shared_at(t, site, to, bytes);
  if (source_bytes > bytes) fail(t, site, "copies more than its size");
  if (from % bytes != 0) fail(t, site, "copies from an address that is not a multiple of its size");
  std::memset(place, 0xff, bytes);
  lane_of(t).copies.open.push_back({place, reinterpret_cast<const uint8_t*>(from), bytes, source_bytes});
}

void copy_commit(Thread& t) { lane_of(t).copies.commit(); }

void copy_wait(Thread& t, uint32_t groups) { lane_of(t).copies.wait(groups, carry_out); }

void copy_wait_all(Thread& t) {
  copy_commit(t);
  copy_wait(t, 0);
}

uint8_t* remote(Thread& t, uint32_t site, uint32_t address, uint32_t bytes) {
  const Cluster& cluster = *lane_of(t).block->cluster;
  const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  if (rank >= cluster.blocks.size() || offset < kSharedBegin || offset > t.shared_end - bytes) {
    char text[96];
    snprintf(text, sizeof(text), "%u bytes at 0x%x, outside shared memory (0x%x to 0x%x)", bytes, address, kSharedBegin,
             t.shared_end);
    fail(t, site, text);
  }
  return cluster.blocks[rank]->shared.data() + offset;
}

}  // namespace emulator
