// SPDX-License-Identifier: Apache-2.0
// What an attention block of the mma.sync family is given and shares: parameters, order of tiles, shared memory.
#pragma once

#include "blocks.cuh"
#include "bounds.cuh"
#include "integers.cuh"
#include "order.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/shared.cuh"
#include "quantize.cuh"
#include "values.cuh"

namespace sagert {
using namespace ptx;

constexpr int kChannels = HEAD_DIM;                  // that are multiplied
constexpr int kHeadDim = stored_channels(HEAD_DIM);  // and that rows in memory have
constexpr bool kCausal = CAUSAL;
constexpr int kStages = STAGES;
constexpr int kAhead = kStages - 1;  // steps that copies are ahead
constexpr int kWarps = WARPS;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = ROWS;                   // queries of a tile
constexpr int kM = kRows / (16 * kWarps);     // fragments of 16 queries of a warp
constexpr int kBlock = 64;                    // keys of a tile of K8 and of V8
constexpr int kStepBlocks = kScaleBlocks;     // that a warp takes at a time
constexpr int kStep = kBlock * kStepBlocks;   // keys
constexpr int kStepTiles = kStep / 8;         // fragments of 8 keys
constexpr int kChannelTiles = kChannels / 8;  // and of 8 channels
// Of the queries' fragments, those of the last channels stand in shared memory where registers are short.
constexpr int kPartChannels = kInt4 ? 64 : 32;  // of an instruction
constexpr int kQueryParts = (kChannels + kPartChannels - 1) / kPartChannels;
constexpr int kQueryPartsShared = QUERY_PARTS_SHARED;
constexpr bool kRowsOfV = kV == V::kIo || kV == V::kHalf;     // a key's channels stand together, in 16 bits
constexpr int kVRowBytes = kRowsOfV ? 2 * kHeadDim : kBlock;  // of a key, or of a channel
constexpr int kKRowBytes = k_row_bytes(kHeadDim), kKTileBytes = kStep * kKRowBytes;
// V that stays in 16 bits: products of a step's last keys are added in the next step, so their values stay longer.
constexpr int kTailKeys = kV == V::kIo ? 16 : 0, kTails = 4;
constexpr int kTailBytes = kTailKeys * kVRowBytes;
constexpr int kVTileBytes = (kRowsOfV ? 2 : 1) * (kStep - kTailKeys) * kHeadDim;

constexpr bool kBounded = kNormsOfK;  // steps without row maxima, where scores are bounded beforehand
// They have a loop of their own where registers allow for two.
constexpr bool kApart = kBounded && kHeadDim == 64;
// Where they are shortest any branch or loop more makes ptxas spill.
constexpr bool kFewRegisters = kCausal && kV == V::kInt8 && kHeadDim == 128;
constexpr bool kUnseenApart = kCausal && !kFewRegisters;  // a tile's first steps, as far as a warp does not see them
// What a thread's addresses start from stands in shared memory: worked out in every step it takes 20 to 30 instructions
// more, and registers are short.
constexpr bool kKeepPlaces = kV == V::kIo;
// Swizzled addresses of a step's first values serve the others, too, with a constant added: 8 instructions less per
// step. Where that was not faster (5 % slower at 64 channels) ptxas swizzles each chunk's own.
constexpr bool kSwizzleOnce = kChannels == 128 && !kCausal;

constexpr int kRingBytes = kStages * (kKTileBytes + kVTileBytes), kStagedBytes = 2 * 16 * kWarps * kChannels;

struct Params {
  const uint16_t* q;
  const int8_t* k8;
  const float* k_scale;
  const int* k_bad;
  const float* k_shift;
  const float* k_norm;
  const int8_t* v;
  const VScaleType* v_scale;
  const float* v_mean;
  const int* v_first;
  const int* head_flags;
  uint16_t* out;
  float* lse;
  float scale_log2;  // softmax scale times log2(e)
  int seqlen_q, seqlen_k, blocks, heads_q, group, head_dim, head_dim_v, tiles, heads_total, section;
  int64_t v_sb, v_sh, v_ss, q_sb, q_sh, q_ss, q_sd, o_sb, o_sh, o_ss, o_sd;
  bool q_vec, o_vec, write_lse;
  // Of INT4: means of blocks of queries, and their products with K in the unit of the exponent.
  const uint16_t* q_mean;
  const float* bias;
  int q_blocks, q_block_rows;
};

// kRows queries of one head. Steps of keys are visited from the last one down: the causal diagonal comes first.
struct Tile {
  int head;   // b * heads_q + h
  int row;    // first query
  int steps;  // that its queries see
};

__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
  Tile tile;
  int position;
  if constexpr (kCausal) {
    const Place place = longest_first(index, p.tiles, p.section, p.heads_total);
    tile.head = place.head;
    position = place.position;
  } else {
    tile.head = index / p.tiles;
    position = index % p.tiles;
  }
  tile.row = position * kRows;
  tile.steps = (p.blocks + kStepBlocks - 1) / kStepBlocks;
  if constexpr (kCausal) tile.steps = min(tile.steps, (tile.row + kRows - 1) / kStep + 1);
  return tile;
}

struct alignas(128) Shared {
  int8_t k[kStages][kKTileBytes];
  int8_t v[kStages][kVTileBytes];
  int8_t v_tail[kTailKeys == 0 ? 1 : kTails][kTailKeys == 0 ? 16 : kTailBytes];
  int8_t rest[kStagedBytes > kRingBytes ? kStagedBytes - kRingBytes : 16];  // of queries that wait to be quantized
  uint16_t v_scale[kV == V::kInt8 ? kStages : 1][kV == V::kInt8 ? kHeadDim : 8];
  float bias[kInt4 ? kStages : 1][kInt4 ? kStep : 4];
  float q_scale[kWarps][8][2 * kM];  // the rows of a lane stand together
  uint4 q[kQueryPartsShared == 0 ? 1 : kQueryPartsShared][kM][kQueryPartsShared == 0 ? 1 : kThreads];
  float maximum[kWarps][8][2 * kM], weight[kV == V::kInt8 ? kWarps : 1][8][2 * kM];
  // Of the tile and its head: they would take registers over all steps.
  Tile tile;
  int steps[kWarps];  // that a warp's queries see
  int full[kWarps];   // those that need no mask
  const int8_t *head_k, *head_v;
  const float *head_k_scale, *head_bias;
  const VScaleType* head_v_scale;
};
// Addresses of what the loop over the keys reads, from the register that holds the address of all.
#define SAGERT_AT(base, member) \
  ((base) + static_cast<uint32_t>(reinterpret_cast<uint64_t>(&reinterpret_cast<Shared*>(0)->member)))

// Behind that stands what only some kernels have, in this order.
struct Places {
  // Of each thread: where its keys and values of step 0 come from, ...
  uint4 sources[kThreads];
  // ... where they go in slot 0, and what it gives ldmatrix of the keys and the values there.
  uint4 targets[kThreads];
};
struct Bounds {
  float bound[kWarps][8][2 * kM];  // what no score of a row exceeds; the rows of a lane stand together
};
constexpr int kPlacesAt = sizeof(Shared), kTargetsAt = kPlacesAt + sizeof(Places::sources);
struct EvenState {                  // where blocks of V may be even
  float offset[kWarps][8][2 * kM];  // what O has too much; the rows of a lane stand together
  uint32_t magic[4];                // kMagic: of a constant ptxas would make four registers for every product
  float sum[kThreads][2 * kM];      // of a lane's weights, for want of registers
};
constexpr int kBoundsAt = kPlacesAt + (kKeepPlaces ? sizeof(Places) : 0);
constexpr int kOffsetsAt = kBoundsAt + (kBounded ? sizeof(Bounds) : 0);
constexpr int kMagicAt = kOffsetsAt + sizeof(EvenState::offset), kSumsAt = kMagicAt + sizeof(EvenState::magic);
constexpr int kSharedBytes = kOffsetsAt + (kEvenV ? sizeof(EvenState) : 0);

// Steps' places in the rings follow one another, downwards as the steps do or upwards: registers suffice for one way.
constexpr int kNextSlot = kTailKeys != 0 ? -1 : 1;
static_assert((kStages & (kStages - 1)) == 0, "stages are counted by masks");

}  // namespace sagert
