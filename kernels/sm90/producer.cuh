// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup: one thread feeds the blocks of K and V, three warps quantize the queries of the next tile.
#pragma once

#include "ptx/async_copy.cuh"
#include "ptx/bulk.cuh"
#include "ptx/pdl.cuh"
#include "tile.cuh"

namespace sagert {

// Starts the copy of a block of V, `block` of head `head_kv`, to a stage.
__device__ __forceinline__ void load_v(const Params& p, int8_t* stage, int head_kv, int block, uint32_t full) {
  mbarrier_arrive_expect(full, kVTileBytes);
  if constexpr (kV == V::kIo) {
    const int heads = p.heads_q / p.group;
    for (int channel = 0; channel < kHeadDim; channel += kMapWidth) {
      bulk_load_tensor(shared_address(stage + channel * kBlock * 2), p.v_map, channel, block * kBlock, head_kv % heads,
                       head_kv / heads, full);
    }
  } else {
    bulk_load(shared_address(stage), p.v8 + (static_cast<int64_t>(head_kv) * p.blocks + block) * kTileBytes, kTileBytes,
              full);
  }
}

// Keeps the stages of K and V full. K runs one block ahead, as the consumers do.
__device__ __forceinline__ void feed_keys(const Params& p, Shared& s) {
  Ring<kStages> k;
  Ring<kStagesV> v;
  for_each_tile(p, [&](int index) {
    const Tile tile = tile_at(p, index);
    const int head_kv = tile.head / p.group;
    const int blocks = tile.end - tile.begin;
#pragma unroll 1
    for (int step = 0; step <= blocks; ++step) {
      if (step < blocks) {
        int64_t block = static_cast<int64_t>(head_kv) * p.blocks + tile.end - 1 - step;
        mbarrier_wait(shared_address(&s.empty_k[k.stage]), k.parity ^ 1);
        uint32_t full = shared_address(&s.full_k[k.stage]);
        mbarrier_arrive_expect(full, kTileBytes);
        bulk_load(shared_address(s.k[k.stage]), p.k8 + block * kTileBytes, kTileBytes, full);
        k.advance();
      }
      if (step > 0) {
        // Consumers of V in INT8 give a block back when they are at the next one, and before the first one "give
        // back" a block -1, which counts as a round of the last stage.
        const bool early = kV == V::kInt8 && v.stage == kStagesV - 1;
        mbarrier_wait(shared_address(&s.empty_v[v.stage]), early ? v.parity : v.parity ^ 1);
        load_v(p, s.v[v.stage], head_kv, tile.end - step, shared_address(&s.full_v[v.stage]));
        v.advance();
      }
    }
  });
}

struct RowScale {
  float inverse, scale;
};

// From the bits of the largest magnitude in a row: a NaN or an infinity in Q makes every score of the row NaN.
__device__ __forceinline__ RowScale row_scale(uint32_t top, float scale_log2) {
  float amax = low_io(top);
  bool finite = amax < infinity();
  float inverse = finite && amax >= kTiny ? 127.f / amax : 0.f;
  return {copysignf(inverse, scale_log2), finite ? amax * (1.f / 127.f) * fabsf(scale_log2) : nan()};
}

// Four channels as int8, the first in the low byte.
__device__ __forceinline__ uint32_t quantize4(uint32_t first, uint32_t second, float inverse) {
  return pack_low_bytes(to_int8(low_io(first), inverse), to_int8(high_io(first), inverse),
                        to_int8(low_io(second), inverse), to_int8(high_io(second), inverse));
}

// Largest over the 4 lanes of a row.
__device__ __forceinline__ uint32_t row_max(uint32_t value) {
  value = max(value, __shfl_xor_sync(~0u, value, 1));
  return max(value, __shfl_xor_sync(~0u, value, 2));
}

constexpr int kVectors = kHeadDim / 32;  // of 8 channels that a lane has of a row, which is shared by 4
constexpr int kRowsAtOnce = kQuantizers / 4;
static_assert(kRows % 8 == 0 && kRowsAtOnce % 8 == 0, "whole warps must reach the shuffles");

__device__ __forceinline__ const uint16_t* queries_of(const Params& p, const Tile& tile) {
  return p.q + tile.head / p.heads_q * p.q_sb + tile.head % p.heads_q * p.q_sh + tile.row * p.q_ss;
}

// Where a lane's vector of a row stands in `raw`; neighbouring rows on different banks.
__device__ __forceinline__ int raw_vector(int r, int quad, int i) {
  return r * (kHeadDim / 8) + (i * 4 + quad ^ r % 2 * 4);
}

// Starts the copy of a tile's contiguous, aligned queries: each lane brings what it will read.
__device__ __forceinline__ void prefetch_queries(const Params& p, Shared& s, int index, int thread) {
  const Tile tile = tile_at(p, index);
  const uint16_t* base = queries_of(p, tile);
  const int quad = thread % 4;
#pragma unroll 1
  for (int r = thread / 4; r < kRows; r += kRowsAtOnce) {
    const bool inside = tile.row + r < p.seqlen_q;
    const uint16_t* row = base + (inside ? r : 0) * p.q_ss;
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i) {
      async_copy16(shared_address(&s.raw[raw_vector(r, quad, i)]), row + (i * 4 + quad) * 8, inside);
    }
  }
}

// One row, whose copy has come; returns the row's scale.
__device__ __forceinline__ float quantize_row(const Params& p, const uint4* raw, int8_t* q, int r, int quad) {
  constexpr uint32_t kMagnitude = 0x7fff7fff;  // of two 16-bit floats: they compare as integers
  uint32_t pair = 0;
#pragma unroll 2
  for (int i = 0; i < kVectors; ++i) {
    uint4 x = raw[raw_vector(r, quad, i)];
    pair = __vmaxu2(__vmaxu2(pair, x.x & kMagnitude), x.y & kMagnitude);
    pair = __vmaxu2(__vmaxu2(pair, x.z & kMagnitude), x.w & kMagnitude);
  }
  RowScale scale = row_scale(row_max(max(pair & 0xffff, pair >> 16)), p.scale_log2);
#pragma unroll 1
  for (int i = 0; i < kVectors; ++i) {
    uint4 x = raw[raw_vector(r, quad, i)];
    const int vector = i * 4 + quad;
    uint2 packed = {quantize4(x.x, x.y, scale.inverse), quantize4(x.z, x.w, scale.inverse)};
    *reinterpret_cast<uint2*>(q + r * kHeadDim + swizzled<kHeadDim>(vector / 2, r) * 16 + vector % 2 * 8) = packed;
  }
  return scale.scale;
}

// Any strides and any number of channels.
__device__ __forceinline__ float quantize_row_any(const Params& p, const uint16_t* row, bool inside, int8_t* q, int r,
                                                  int quad) {
  auto load = [&](int d) { return inside && d < p.head_dim ? row[d * p.q_sd] : uint16_t{0}; };
  uint32_t top = 0;
#pragma unroll 1
  for (int d = quad; d < kHeadDim; d += 4) top = max(top, load(d) & 0x7fffu);
  RowScale scale = row_scale(row_max(top), p.scale_log2);
#pragma unroll 1
  for (int d = quad; d < kHeadDim; d += 4) {
    uint32_t bits = to_int8(low_io(load(d)), scale.inverse);
    q[r * kHeadDim + swizzled<kHeadDim>(d / 16, r) * 16 + d % 16] = static_cast<int8_t>(bits);
  }
  return scale.scale;
}

// The row times the shift of K, which the scores lack.
__device__ __forceinline__ float shift_of_row(const Params& p, const uint16_t* row, bool inside, const float* shift,
                                              int quad) {
  float sum = 0.f;
#pragma unroll 1
  for (int d = quad; d < p.head_dim; d += 4) {
    if (inside) sum = fmaf(low_io(row[d * p.q_sd]), shift[d], sum);
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  return sum * p.scale_log2;
}

// Quantizes the queries of a tile into a slot, and brings what its epilogue needs.
__device__ __forceinline__ void quantize_tile(const Params& p, Shared& s, int index, int slot, int thread, bool first) {
  async_copy_wait();
  // One loop for each matter: together they would take more registers than there are.
#pragma unroll 1
  for (int r = thread / 4; r < kRows; r += kRowsAtOnce) {
    float scale;
    if (p.q_vec) {
      scale = quantize_row(p, s.raw, s.q[slot], r, thread % 4);
    } else {
      const Tile tile = tile_at(p, index);
      const bool inside = tile.row + r < p.seqlen_q;
      scale = quantize_row_any(p, queries_of(p, tile) + r * p.q_ss, inside, s.q[slot], r, thread % 4);
    }
    if (thread % 4 == 0) s.q_scale[slot][r] = scale;
  }
  if (first) wait_for_prerequisites();  // queries do not come from the pre-pass
  forget(index);
  const Tile tile = tile_at(p, index);
  const int head_kv = tile.head / p.group;
  if (p.write_lse) {
#pragma unroll 1
    for (int r = thread / 4; r < kRows; r += kRowsAtOnce) {
      const bool inside = tile.row + r < p.seqlen_q;
      const uint16_t* row = queries_of(p, tile) + r * p.q_ss;
      const float shift = shift_of_row(p, row, inside, p.k_shift + int64_t{head_kv} * kHeadDim, thread % 4);
      if (thread % 4 == 0) s.q_shift[slot][r] = shift;
    }
  }
  if constexpr (kV != V::kIo) {
#pragma unroll 1
    for (int d = thread; d < kHeadDim; d += kQuantizers) {
      if constexpr (kV == V::kFp8) s.v_scale[slot][d] = p.v_scale[int64_t{head_kv} * kHeadDim + d];
      s.v_mean[slot][d] = p.v_mean[int64_t{head_kv} * kHeadDim + d];
    }
  }
  // Without a mask nobody asks where 16-bit V is not finite, and the pre-pass does not say.
  const int known = kV == V::kIo && !kCausal ? 1 : 2;
  if (thread < 2) s.flags[slot][thread] = thread < known ? p.head_flags[int64_t{head_kv} * 2 + thread] : 0;
  fence_async_shared();
}

// Keeps the slots of quantized queries full; those of one more tile are on their way to shared memory.
__device__ __forceinline__ void feed_queries(const Params& p, Shared& s) {
#pragma unroll 1
  for (int turn = -1;; ++turn) {
    // What follows from these would be kept over all tiles, in more registers than there are.
    int thread = threadIdx.x - 32, round = turn;
    forget(thread);
    forget(round);
    if (turn >= 0) {
      const int slot = turn % 2;
      mbarrier_wait(shared_address(&s.empty_q[slot]), turn / 2 % 2 ^ 1);
      quantize_tile(p, s, blockIdx.x + round * gridDim.x, slot, thread, turn == 0);
      mbarrier_arrive(shared_address(&s.full_q[slot]));
    }
    forget(thread);
    const int next = blockIdx.x + (turn + 1) * gridDim.x;
    if (next >= p.tiles * p.heads_total) break;
    if (p.q_vec) prefetch_queries(p, s, next, thread);
  }
}

}  // namespace sagert
