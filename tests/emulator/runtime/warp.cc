// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: the last one to come does it for all.
#include "block.h"

namespace emulator {
namespace {

bool needs_same_site(Together what) { return what >= Together::kMatrices1; }

void match(const WarpLanes& warp, Together what, uint32_t mask) {
  uint64_t value[kWarp];
  auto has = [&](uint32_t i) { return (mask >> i & 1) != 0; };
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (has(i)) value[i] = static_cast<uint64_t>(warp.lane[i]->words[1]) << 32 | warp.lane[i]->words[0];
  }
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (!has(i)) continue;
    uint32_t same = 0;
    for (uint32_t j = 0; j < kWarp; ++j) same |= static_cast<uint32_t>(has(j) && value[j] == value[i]) << j;
    const bool all = same == mask;
    warp.lane[i]->words[0] = what == Together::kMatchAny || all ? same : 0;
    warp.lane[i]->words[1] = all;
  }
}

void elect(const WarpLanes& warp, uint32_t mask) {
  const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(mask));
  for (uint32_t i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    warp.lane[i]->words[0] = leader;
    warp.lane[i]->words[1] = i == leader;
  }
}

}  // namespace

void shuffle(const WarpLanes& warp, Together what, uint32_t mask) {
  uint32_t value[kWarp] = {};
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) value[i] = warp.lane[i]->words[0];
  }
  for (uint32_t i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    uint32_t* words = warp.lane[i]->words;
    const uint32_t by = words[1] & 31, clamp = words[2] & 31, segment = words[2] >> 8 & 31;
    const uint32_t most = (i & segment) | (clamp & ~segment);
    uint32_t from = i;
    bool inside = false;
    if (what == Together::kShuffleUp) from = i - by, inside = static_cast<int32_t>(from) >= static_cast<int32_t>(most);
    if (what == Together::kShuffleDown) from = i + by, inside = from <= most;
    if (what == Together::kShuffleXor) from = i ^ by, inside = from <= most;
    if (what == Together::kShuffleIndex) from = (i & segment) | (by & ~segment), inside = from <= most;
    if (!inside) from = i;
    if ((mask >> from & 1) == 0) {
      fail(*warp.lane[i], warp.lane[i]->site, "shuffles from lane " + std::to_string(from) + ", which takes no part");
    }
    words[0] = value[from];
    words[1] = inside;
  }
}

void vote(const WarpLanes& warp, Together what, uint32_t mask) {
  uint32_t ballot = 0;
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) ballot |= static_cast<uint32_t>(warp.lane[i]->words[0] != 0) << i;
  }
  uint32_t result = ballot;
  if (what == Together::kVoteAll) result = ballot == mask;
  if (what == Together::kVoteAny) result = ballot != 0;
  if (what == Together::kVoteUniform) result = ballot == mask || ballot == 0;
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) warp.lane[i]->words[0] = result;
  }
}

void reduce(const WarpLanes& warp, Together what, uint32_t mask) {
  bool first = true;
  uint32_t total = 0;
  for (uint32_t i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const uint32_t x = warp.lane[i]->words[0];
    const int32_t s = static_cast<int32_t>(x), t = static_cast<int32_t>(total);
    uint32_t next = x;
    if (!first) {
      if (what == Together::kReduceAddU32) next = total + x;
      if (what == Together::kReduceMinU32) next = x < total ? x : total;
      if (what == Together::kReduceMaxU32) next = x > total ? x : total;
      if (what == Together::kReduceMinS32) next = s < t ? x : total;
      if (what == Together::kReduceMaxS32) next = s > t ? x : total;
      if (what == Together::kReduceAnd) next = total & x;
      if (what == Together::kReduceOr) next = total | x;
      if (what == Together::kReduceXor) next = total ^ x;
    }
    total = next;
    first = false;
  }
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) warp.lane[i]->words[0] = total;
  }
}

void together(Thread& t, uint32_t site, Together what, uint32_t mask, uint32_t* words, const Shape* shape) {
  Lane& self = lane_of(t);
  Block& block = *self.block;
  self.together = what;
  self.mask = mask;
  self.words = words;
  self.shape = shape;
  self.site = site;
  if ((mask >> t.lane & 1) == 0) fail(t, site, "the mask leaves out the lane itself");
  WarpLanes warp = {};
  const uint32_t begin = t.warp * kWarp;
  for (uint32_t i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (begin + i >= block.lanes.size()) fail(t, site, "the mask names lanes that do not exist");
    Lane& other = *block.lanes[begin + i];
    warp.lane[i] = &other;
    if (&other == &self) continue;
    const bool here = other.state == State::kTogether && other.together == what && other.mask == mask &&
                      (!needs_same_site(what) || other.site == site);
    if (!here) {
      wait(self, State::kTogether, site);
      return;
    }
  }
  if (what == Together::kGroupMultiply) {
    group_multiply(warp, *shape);
  } else if (what == Together::kMultiply) {
    multiply(warp, *shape);
  } else if (what >= Together::kMatrices1) {
    move_matrices(warp, what);
  } else if (what >= Together::kReduceAddU32) {
    reduce(warp, what, mask);
  } else if (what == Together::kElect) {
    elect(warp, mask);
  } else if (what >= Together::kMatchAny) {
    match(warp, what, mask);
  } else if (what >= Together::kVoteAll) {
    vote(warp, what, mask);
  } else if (what >= Together::kShuffleUp) {
    shuffle(warp, what, mask);
  }
  for (uint32_t i = 0; i < kWarp; ++i) {
    if (warp.lane[i] != nullptr) warp.lane[i]->state = State::kReady;
  }
  ++block.cluster->progress;
}

}  // namespace emulator
