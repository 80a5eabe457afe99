// SPDX-License-Identifier: Apache-2.0
// What the warps of an attention block share: parameters, order of tiles, shared memory, and its layout for wgmma.
#pragma once

#include "bounded.cuh"
#include "integers.cuh"
#include "leading.cuh"
#include "order.cuh"
#include "ptx/bulk.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/registers.cuh"
#include "quantize.cuh"
#include "values.cuh"

namespace sagert {
using namespace ptx;

constexpr int kHeadDim = HEAD_DIM;
constexpr bool kCausal = CAUSAL;
constexpr int kStages = STAGES;  // each a block of K and of V
constexpr int kBlock = 128;      // keys of a tile of K8 and of V8
// Keys that a warpgroup takes at a time: a block, or, where registers allow, half of one more. Three blocks are two
// steps then, which share the one in the middle.
constexpr int kStep = STEP, kSide = kStep - kBlock, kPieces = kSide == 0 ? 1 : 2;
static_assert(kSide == 0 || (kSide == kBlock / 2 && kV == V::kFp8 && kHeadDim == 64), "written for these");
constexpr int kGroups = GROUPS;                // consumer warpgroups of 64 queries
constexpr int kRows = 64 * kGroups;            // queries of a tile
constexpr int kTileBytes = kBlock * kHeadDim;  // of a block of K8 and of V8
constexpr int kVTileBytes = kV == V::kIo ? 2 * kTileBytes : kTileBytes;
constexpr int kMapWidth = 64;  // channels in 16 bits that one copy of a tensor map brings: the width of the swizzle
// Behind the channels of a tile of V stand as many of ones: P V then has the sums of P, too. Of 16-bit V they take as
// much room as a copy of the tensor map, which 128 channels leave for too few stages.
constexpr int kOnes = kV == V::kFp8 || (kV == V::kIo && kHeadDim == 64) ? 8 : 0;
constexpr int kOnesBytes = kOnes == 0 ? 0 : kV == V::kIo ? kMapWidth * 2 * kBlock : kOnes * kBlock;
constexpr int kVSlotBytes = kVTileBytes + kOnesBytes, kVStageBytes = kPieces * kVSlotBytes;
constexpr int kKStageBytes = kStep * kHeadDim;
constexpr bool kBounded = is_bounded_at(kHeadDim);
constexpr bool kHalfSums = kV == V::kFp8;  // of P V, in fp16 (half_sums.cuh)
// Sums over more steps are in fp32: in fp16 each addition rounds to 11 bits.
constexpr int kHalfSteps = (256 * kBlock + kStep - 1) / kStep;
// Do the warpgroups share the keys of a tile with queries for one of them only (joint.cuh), and how many steps are
// worth it? Other types of V leave no registers, or no stage to be filled while each warpgroup has one.
constexpr bool kJoins = kV == V::kFp8;
constexpr int kJointSteps = 4 * kGroups * kBlock / kStep;
static_assert(!kJoins || kGroups < kStages, "one block must be on its way");
constexpr int kSettleSteps = kSide == 0 ? 32 : 24;  // behind which they are moved to settled sums, where more follow
// May consumers have settled sums at a tile of that many steps?
__device__ __forceinline__ bool has_settled_sums(int steps) { return kHalfSums && steps > kSettleSteps; }
// Infinities and NaN of 16-bit V go through wgmma as they are, and where a mask hides a key from some queries of a
// block 0 times one of these would be NaN. So consumers look for them there themselves (nonfinite.cuh).
constexpr bool kFindsNonfinite = kV == V::kIo && kCausal;
constexpr int kNotes = 8;  // tiles that a warpgroup may be ahead of another one, and more
constexpr int kThreads = 128 * (kGroups + 1);
// Registers per thread of the two kinds of warpgroups: together what the launch gives all of them, 128 each.
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
static_assert(kGroups == 3, "other numbers of warpgroups have other registers");

struct Params {
  const uint16_t* q;
  const int8_t* k8;
  const float* k_scale;
  const int* k_bad;
  const float* k_shift;
  const float* k_norm;
  const int8_t* v8;
  const TensorMap* v_map;
  const VScaleType* v_scale;
  const float* v_mean;
  int* v_first;  // first keys of V that are +inf or NaN, and -inf or NaN; kFindsNonfinite: of those found so far
  const int* head_flags;
  uint16_t* out;
  float* lse;
  float scale_log2;  // softmax scale times log2(e)
  int seqlen_q, seqlen_k, blocks, heads_q, group, head_dim, head_dim_v, tiles, heads_total, section;
  int64_t q_sb, q_sh, q_ss, q_sd, o_sb, o_sh, o_ss, o_sd;
  bool q_vec, o_vec, write_lse;
  float* part_out;  // of split keys, in fp32
  float* part_lse;
  int* next_tile;  // how many tiles were taken behind each thread block's first, or null: tiles go by turns
};

// A value that all lanes have, in a register that all lanes share.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_max_sync(~0u, value); }

// With few tiles the keys of each are split: gridDim.y thread blocks take a range each, combine.cu joins the parts.
__device__ __forceinline__ bool is_split() { return grid_height() > 1; }
__device__ __forceinline__ bool has_last_keys() { return blockIdx.y + 1 == grid_height(); }

// Of all keys.
__device__ __forceinline__ int count_of_steps(const Params& p) {
  return kSide == 0 ? p.blocks : (p.seqlen_k + kStep - 1) / kStep;
}

// Step 2 i has block 3 i and the first half of the next one, step 2 i + 1 block 3 i + 2 and the second half of the one
// before it. In shared memory and among the scores the whole block comes first.
__device__ __forceinline__ int whole_block(int step) { return kSide == 0 ? step : (3 * step + 1) >> 1; }
__device__ __forceinline__ int side_block(int step) { return 3 * (step >> 1) + 1; }
// The first key of a step's piece: of the whole block, or of the half.
__device__ __forceinline__ int first_key(int step, int piece) {
  return piece == 0 ? whole_block(step) * kBlock : side_block(step) * kBlock + (step & 1) * kSide;
}

// kRows queries of one head. Steps of keys are visited from the last one down: the causal diagonal comes first.
struct Tile {
  int head;   // b * heads_q + h
  int row;    // first query
  int begin;  // range of the steps of keys, of those that the tile sees; a part may have none
  int end;
  bool joint;  // the warpgroups share its keys
};

__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
  Tile tile;
  int position;
  if constexpr (kCausal) {
    const Place place = longest_first(index, p.tiles, p.section, p.heads_total);
    tile.head = place.head;
    position = place.position;
  } else {
    // Tiles that lack queries are shorter and come last: among the others they would fall to the same thread blocks
    // wherever the number of tiles divides that of the blocks.
    const int full = p.seqlen_q / kRows, rest = index - full * p.heads_total;
    tile.head = rest < 0 ? index / full : rest;
    position = rest < 0 ? index % full : full;
  }
  tile.row = position * kRows;
  tile.begin = 0;
  tile.joint = kJoins && p.seqlen_q - tile.row <= 64;
  const int rows = tile.joint ? 64 : kRows;
  tile.end = count_of_steps(p);
  if constexpr (kCausal) tile.end = min(tile.end, (tile.row + rows - 1) / kStep + 1);
  if (is_split()) {
    const unsigned all = tile.end;
    tile.begin = static_cast<int>(all * blockIdx.y / grid_height());
    tile.end = static_cast<int>(all * (blockIdx.y + 1) / grid_height());
  }
  const int steps = tile.end - tile.begin;  // the loop for sums in fp32 does not share
  tile.joint = tile.joint && steps >= kJointSteps && steps <= kHalfSteps;
  return tile;
}

// Where a task stands in a round (queue.cuh), if there are rounds.
template <bool kRounds>
struct RoundOfTask {
  __device__ __forceinline__ void set_round(int, int) {}
  __device__ __forceinline__ int place() const { return 0; }
  __device__ __forceinline__ int in_half() const { return 0; }
};
template <>
struct RoundOfTask<true> {
  int place_;    // of the tile in the round, or kAgain
  int in_half_;  // P V is summed in fp16

  __device__ __forceinline__ void set_round(int place, int steps) {
    place_ = place, in_half_ = place >= 0 && steps <= kHalfSteps;
  }
  __device__ __forceinline__ int place() const { return place_; }
  __device__ __forceinline__ int in_half() const { return in_half_; }
};

// What a consumer warpgroup has to do at a tile.
struct Task : RoundOfTask<kHalfSums> {
  int head;  // b * heads_q + h, or kEndOfRound or kEnd
  int head_kv;
  int row;      // its first query
  int skipped;  // steps of the tile that other warpgroups see, but not this one: the last ones
  int stride;   // of the others one of so many is this warpgroup's
  int end;      // range of the steps that it sees, from the last one down
  int begin;
  int masked;           // how many of them need masks, the last ones
  int v_bad;            // the head's quantized V lacks an infinity or a NaN
  float k_norm;         // of the head's keys, the largest
  int has_leading;      // kLeadingKeys: K of the head is finite; elsewhere the leading keys are like others
  const int* bad_keys;  // of the head, bits by block and quad, or null
  int64_t out;          // where the first query's row of the output is
};

// Told in place of a tile.
constexpr int kEnd = -1;         // there are no more
constexpr int kEndOfRound = -2;  // some of the round may follow once more
constexpr int kAgain = -1;       // told in place of the place of those

constexpr int kTurns = 4;           // tiles that the producer may be ahead of the scouts
constexpr int kRoundTiles = 256;    // in a round at most
constexpr int kScoutArrivals = 33;  // of its lanes' copies, and when it has written the task

// A thread's sums in two rows: of P, and what O has too much in the channels of its lane's group (consumer_int8.cuh).
struct alignas(16) Totals {
  float l[2], excess[2];
};

struct Shared {
  int8_t k[kStages][kKStageBytes];
  int8_t v[kStages][kVStageBytes];
  int8_t q[kRows * kHeadDim];
  uint4 raw[kRows * kHeadDim / 8];  // queries of the tile that comes next, in 16 bits; before that, settled sums
  float q_scale[kRows];
  float q_shift[kRows];                 // Q times the shift of K, in the unit of the exponent
  float q_bound[kBounded ? kRows : 1];  // what no score exceeds, likewise
#if V8_I8
  float maxima[2][128 * kGroups];      // of each thread's two rows
  float exact_sums[2][128 * kGroups];  // of their exponentials
  float leading[kRows][kLeadingKeys];  // scores
  Totals totals[kHeadDim == 128 ? 128 * kGroups : 1];
#endif
  Task tasks[kGroups][2];                                // of this tile and the next one, in turns
  uint8_t turns[kHalfSums ? 128 * kGroups : 1];          // which of them is each thread's: registers are short
  int tiles[kTurns];                                     // what the producer has taken (queue.cuh)
  int places[kTurns];                                    // of these in the round
  int taken[kHalfSums ? kRoundTiles : 1];                // in this round
  uint32_t overflown[kHalfSums ? kRoundTiles / 32 : 1];  // which of these are to be computed again, a bit each
  int has_overflown;
  int notes[kFindsNonfinite ? kNotes : 1];  // turns, each of the tile in which V was last found not finite
  uint64_t full[kStages], empty[kStages];
  uint64_t full_q[kGroups], empty_q[kGroups];
  uint64_t full_tile[kTurns], empty_tile[kTurns];
  uint64_t empty_sums[kHalfSums ? kGroups : 1];  // the settled ones have been read
};

// A position in a ring of stages and the parity of its round.
template <int count>
struct Ring {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == count) {
      stage = 0;
      parity ^= 1;
    }
  }

  __device__ __forceinline__ void retreat() {
    if (stage == 0) {
      stage = count;
      parity ^= 1;
    }
    --stage;
  }
};

// wgmma's descriptor of an operand whose rows are contiguous along K and swizzled over `row_bytes` (64 or 128).
template <int row_bytes>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kLayout = row_bytes == 128 ? 1 : 2;
  constexpr uint64_t kStride = 8 * row_bytes >> 4;  // between groups of 8 rows, in 16 bytes
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | kStride << 32 | kLayout << 62;
}

// The same for keys of kMapWidth channels of 16 bits, one after the other: channels are contiguous, keys are summed
// over. What lies further along the channels is a copy of the tensor map later.
__device__ __forceinline__ uint64_t descriptor_io(uint32_t address) {
  constexpr uint64_t kNextChannels = kBlock * kMapWidth * 2 >> 4, kNextKeys = 8 * kMapWidth * 2 >> 4, kLayout = 1;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | kNextChannels << 16 | kNextKeys << 32 | kLayout << 62;
}

// The operand `bytes` behind another one: its address is all that changes.
__device__ __forceinline__ uint64_t operand_behind(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xffffffff00000000u) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

}  // namespace sagert
