// SPDX-License-Identifier: Apache-2.0
// The blocks of one cluster while they run: their threads' states, what they wait for, and who runs next.
#ifndef SAGERT_EMULATOR_BLOCK_H_
#define SAGERT_EMULATOR_BLOCK_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace emulator {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kBarriers = 16;

enum class State : uint8_t { kReady, kTogether, kBarrier, kYielded, kCluster, kDone };

// A copy that a thread has started.
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, source_bytes;
};

// Copies since the last commit, and groups of older ones, the oldest first.
struct CopyGroups {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void clear() {
    open.clear();
    committed.clear();
  }
  // Calls carry_out(group) until at most `groups` are left.
  template <typename CarryOut>
  void wait(uint32_t groups, CarryOut carry_out) {
    for (; committed.size() > groups; committed.pop_front()) carry_out(committed.front());
  }
};

// A copy by the copy engine to shared memory: a piece at a time, counted at a barrier.
struct Transfer {
  std::vector<Copy> pieces;
  uint8_t* barrier;
  uint32_t bytes;
};

struct Block;

// A thread with what the runtime knows of it; translated code sees the base.
struct Lane : Thread {
  Block* block;
  Fiber fiber;
  State state;
  uint32_t site;  // of the instruction it waits at
  // What it brings to its warp, or to a barrier.
  Together together;
  uint32_t mask;
  uint32_t* words;
  const Shape* shape;
  uint32_t barrier;
  CopyGroups copies, bulk_stores;
  uint64_t cluster_turn;  // of the cluster's barrier, at which it has arrived
};

struct Barrier {
  uint32_t arrived = 0, expected = 0, ones = 0;
  uint32_t result = 0;
};

struct Launch {
  const Translation* translation;
  const Kernel* kernel;
  uint32_t grid[3], block[3], cluster, dynamic_bytes;
  void* const* parameters;
  uint64_t seed;  // 0: warps take turns; else their order, and that of their lanes, is random
};

struct Cluster;

struct Block {
  Cluster* cluster;
  uint32_t rank;
  std::vector<uint8_t> shared;
  std::vector<std::unique_ptr<Lane>> lanes;
  Barrier barriers[kBarriers];
};

// Kept from cluster to cluster: the stacks of its fibers are.
struct Cluster {
  const Launch* launch = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  std::mt19937_64 random;
  uint64_t progress = 0;    // counts what can end a wait
  Lane* current = nullptr;  // who runs
  std::deque<Transfer> transfers;
  uint64_t cluster_turn = 0;  // of the barrier for all blocks
  uint32_t cluster_arrived = 0;
  bool failed = false;
  std::string message;

  // Runs the cluster whose first block is number `first` of the grid; false when it failed.
  bool run(const Launch& launch, uint64_t first);

 private:
  void prepare(uint64_t first);
  bool run_warp(Block& block, uint32_t warp);
  void describe_deadlock(const char* kind);
};

// ---- What the parts of the runtime offer to each other ----

extern const Services kServices;

inline Lane& lane_of(Thread& t) { return static_cast<Lane&>(t); }

// Does not return: the cluster is given up.
[[noreturn]] void fail(Thread& t, uint32_t site, const std::string& what);

// Lets others run until the state is ready again.
void wait(Lane& lane, State state, uint32_t site);

void together(Thread&, uint32_t site, Together, uint32_t mask, uint32_t* words, const Shape*);
uint32_t barrier(Thread&, uint32_t site, uint32_t id, uint32_t threads, bool wait, Reduce, bool predicate);
void yield(Thread&, uint32_t site);
void copy(Thread&, uint32_t site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes);
void copy_commit(Thread&);
void copy_wait(Thread&, uint32_t groups);
void copy_wait_all(Thread&);
uint8_t* remote(Thread&, uint32_t site, uint32_t address, uint32_t bytes);
void mbarrier_init(Thread&, uint32_t site, uint32_t barrier, uint32_t count);
void mbarrier_arrive(Thread&, uint32_t site, uint32_t barrier, uint32_t count, uint32_t expected_bytes);
bool mbarrier_test(Thread&, uint32_t site, uint32_t barrier, uint32_t parity, bool waits);
void bulk_load(Thread&, uint32_t site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier);
void bulk_tensor(Thread&, uint32_t site, uint32_t to, uint64_t map, const int32_t* place, uint32_t barrier);
void bulk_store(Thread&, uint32_t site, uint64_t to, uint32_t from, uint32_t bytes);
void bulk_commit(Thread&);
void bulk_wait(Thread&, uint32_t groups);
void cluster_arrive(Thread&, uint32_t site);
void cluster_wait(Thread&, uint32_t site);
// The oldest transfer of the copy engine ends.
void finish_transfer(Cluster&);
// A thread is gone: what it has started is finished, and nobody waits for it.
void leave(Lane& lane);
float rounded(char operation, char mode, float a, float b, float c);
// A thread is gone: barriers for all threads expect one less.
void leave_barriers(Lane& lane);

// Lanes of one warp, by number; those that are not there are null.
struct WarpLanes {
  Lane* lane[kWarp];
};
void shuffle(const WarpLanes& warp, Together what, uint32_t mask);
void vote(const WarpLanes& warp, Together what, uint32_t mask);
void reduce(const WarpLanes& warp, Together what, uint32_t mask);
void move_matrices(const WarpLanes& warp, Together what);
void multiply(const WarpLanes& warp, const Shape& shape);
void group_multiply(const WarpLanes& warp, const Shape& shape);

// A tensor map, as cuTensorMapEncodeTiled of this driver writes it.
struct TensorMap {
  uint64_t address;
  uint64_t strides[3];
  uint32_t sizes[4];
  uint16_t box[4];
  uint16_t element_bytes, swizzle;
};

}  // namespace emulator

#endif  // SAGERT_EMULATOR_BLOCK_H_
