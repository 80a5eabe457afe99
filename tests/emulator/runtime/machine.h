// SPDX-License-Identifier: Apache-2.0
// What a translated kernel sees of the emulated machine. Translations are libraries of their own: they reach the
// runtime only through the functions in Services.
#ifndef SAGERT_EMULATOR_MACHINE_H_
#define SAGERT_EMULATOR_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

// Generic addresses of shared memory: no host pointer looks like these.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint32_t kRankShift = 24;      // shared addresses: rank of the block in its cluster, then the offset
constexpr uint32_t kSharedBegin = 1024;  // offsets below are nobody's, so that a null address shows

// What lanes of a warp do together. Each deposits words, and finds the results in their place.
enum class Together {
  kSync,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kShuffleIndex,  // value, lane, clamp -> value, in range
  kVoteAll,
  kVoteAny,
  kVoteUniform,
  kVoteBallot,  // predicate -> predicate, or ballot
  kMatchAny,
  kMatchAll,  // two words -> mask, predicate
  kElect,     // -> leader, predicate
  kReduceAddU32,
  kReduceMinU32,
  kReduceMaxU32,
  kReduceMinS32,
  kReduceMaxS32,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kMatrices1,
  kMatrices2,
  kMatrices4,  // address -> fragments
  kMatrices1Transposed,
  kMatrices2Transposed,
  kMatrices4Transposed,
  kStoreMatrices1,
  kStoreMatrices2,
  kStoreMatrices4,  // address, fragments
  kStoreMatrices1Transposed,
  kStoreMatrices2Transposed,
  kStoreMatrices4Transposed,
  kMultiply,       // a, b, c -> d; the shape is in the argument
  kGroupMultiply,  // d, a or its descriptor, b's descriptor, whether d counts -> d: a warp's part of wgmma
};

// Element types of mma.sync.
enum class Element : uint8_t { kS8, kU8, kS4, kU4, kF16, kBF16, kE4M3, kE5M2, kS32, kF32 };

struct Shape {
  uint16_t m, n, k;
  Element a, b, c;          // c: of the accumulators
  bool a_shared, b_across;  // wgmma: A is in shared memory; B's columns are contiguous, not its rows
};

struct Thread;

// Block-wide barriers: what becomes of the predicate.
enum class Reduce { kNone, kAnd, kOr, kCount };

struct Services {
  void (*together)(Thread&, uint32_t site, Together, uint32_t mask, uint32_t* words, const Shape*);
  uint32_t (*barrier)(Thread&, uint32_t site, uint32_t id, uint32_t threads, bool wait, Reduce, bool predicate);
  void (*yield)(Thread&, uint32_t site);
  void (*copy)(Thread&, uint32_t site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes);
  void (*copy_commit)(Thread&);
  void (*copy_wait)(Thread&, uint32_t groups);
  void (*copy_wait_all)(Thread&);
  uint8_t* (*remote)(Thread&, uint32_t site, uint32_t address, uint32_t bytes);
  void (*fail)(Thread&, uint32_t site, const char* what, uint64_t value);  // does not return
  float (*rounded)(char operation, char mode, float, float, float);
  void (*mbarrier_init)(Thread&, uint32_t site, uint32_t barrier, uint32_t count);
  void (*mbarrier_arrive)(Thread&, uint32_t site, uint32_t barrier, uint32_t count, uint32_t expected_bytes);
  bool (*mbarrier_test)(Thread&, uint32_t site, uint32_t barrier, uint32_t parity, bool waits);
  void (*bulk_load)(Thread&, uint32_t site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier);
  void (*bulk_tensor)(Thread&, uint32_t site, uint32_t to, uint64_t map, const int32_t* place, uint32_t barrier);
  void (*bulk_store)(Thread&, uint32_t site, uint64_t to, uint32_t from, uint32_t bytes);
  void (*bulk_commit)(Thread&);
  void (*bulk_wait)(Thread&, uint32_t groups);
  void (*cluster_arrive)(Thread&, uint32_t site);
  void (*cluster_wait)(Thread&, uint32_t site);
};

struct Thread {
  uint32_t tid[3], ntid[3], ctaid[3], nctaid[3];
  uint32_t lane, warp, rank, cluster_size;
  uint8_t* shared;      // of offset 0
  uint32_t shared_end;  // first offset beyond
  uint32_t dynamic_bytes;
  uint64_t clock;
  void* const* parameters;
  const Services* services;
};

struct Kernel {
  const char* name;
  void (*run)(Thread&);
  uint32_t static_bytes, dynamic_offset;  // of shared memory, from offset 0 on
  uint32_t parameter_count;
  const uint32_t* parameter_bytes;
};

struct Translation {
  const Kernel* kernels;
  uint32_t kernel_count;
  const char* const* sites;  // text of the instructions that may fail or wait
};

// ---- Memory, as a kernel reaches it ----

inline uint8_t* shared_at(Thread& t, uint32_t site, uint64_t address, uint32_t bytes) {
  const uint32_t offset = static_cast<uint32_t>(address) - (t.rank << kRankShift);
  if (offset % bytes != 0) t.services->fail(t, site, "shared address is not a multiple of the access", address);
  if (offset < kSharedBegin || offset > t.shared_end - bytes) return t.services->remote(t, site, address, bytes);
  return t.shared + offset;
}

inline uint8_t* global_at(Thread& t, uint32_t site, uint64_t address, uint32_t bytes) {
  if (address % bytes != 0) t.services->fail(t, site, "global address is not a multiple of the access", address);
  if (address < 4096) t.services->fail(t, site, "null pointer", address);
  return reinterpret_cast<uint8_t*>(address);
}

inline uint8_t* generic_at(Thread& t, uint32_t site, uint64_t address, uint32_t bytes) {
  if (address >= kSharedWindow) return shared_at(t, site, address - kSharedWindow, bytes);
  return global_at(t, site, address, bytes);
}

inline uint8_t* parameter_at(Thread& t, uint32_t index, uint64_t offset) {
  return static_cast<uint8_t*>(t.parameters[index]) + offset;
}

template <typename T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
inline void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

// Read-modify-write; returns what was there. Blocks may run on several threads of the host.
template <typename T, typename Change>
inline T change(uint8_t* place, Change next) {
  T* at = reinterpret_cast<T*>(place);
  T old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  for (;;) {
    T wanted = next(old);
    if (__atomic_compare_exchange_n(at, &old, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return old;
  }
}

}  // namespace emulator

#endif  // SAGERT_EMULATOR_MACHINE_H_
