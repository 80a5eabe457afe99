// SPDX-License-Identifier: Apache-2.0
// The schedule for products that the tensor core can add to O itself (V in 16 bits): while a warp exponentiates the
// scores of one step, its tensor core has P V of the step before, then Q K^T of the next one.
#pragma once

#include "ptx/half2.cuh"
#include "warp.cuh"

namespace sagert {

// P's exponent at a row's maximum, and the one above which a score moves the maximum: floats in 16 bits lose nothing by
// the margin, and fp16 holds up to 2^15.
constexpr float kAtMaximum = 8.f, kLargest = 14.f;
constexpr int kChunks = kStep / 16;            // of 16 keys
constexpr int kUnits = kChannelTiles / 2;      // parts of a chunk's P V, 16 channels each
constexpr int kPairs = 4 * kM;                 // of scores that a lane has of a chunk
using Weights = uint32_t[kChunks][kM][4];      // A fragments of P V

// Products of two pairs in 16 bits.
__device__ __forceinline__ uint32_t multiply_io2(uint32_t a, uint32_t b) {
#if SAGERT_IO_BF16
  return bfloat2_fma(a, b, 0x80008000u);  // + -0
#else
  return half2_multiply(a, b);
#endif
}

struct DirectWarp : Warp {
  using Warp::Warp;
  float next_scale;  // of this lane's keys of the step whose scores are there
  float c[kR], d[kR];             // exponents of the step's scores' bits are c * bits + d
  Weights weights;                // of the step before, whose product O still lacks

  __device__ __forceinline__ void multiply_k_all(int stage) {
    const uint32_t address = k_lane + stage * kKTileBytes;
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 32; k += 2) {
        uint32_t fragments[4];
        load_k(fragments, n, k, address);
        multiply_k(n, k, fragments);
        multiply_k(n, k + 1, fragments);
      }
    }
    next_scale = s.k_scale[stage][quad()];
  }

  __device__ __forceinline__ void set_offset(int r) { d[r] = fmaf(-kRound, c[r], b[r]); }

  // Exponents' factors, and the row maxima, which move only where a score is too far above them.
  __device__ __forceinline__ void reduce(int step) {
#pragma unroll
    for (int r = 0; r < kR; ++r) c[r] = q_scale[r] * next_scale;
    if (step >= full) {
      const uint32_t bad = bad_keys(step);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        mask_row(r, step, bad);
        c[r] = fmaxf(c[r], kLeastScale);
      }
    }
    bool within = true;
    int top[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      set_offset(r);
      top[r] = row_top(r);
      within = within && fmaf(__int_as_float(top[r]), c[r], d[r]) <= kLargest;
    }
    if (__any_sync(~0u, !within)) {
#pragma unroll
      for (int r = 0; r < kR; ++r) advance_maximum(r, top[r]);
    }
  }

  // `top`: bits of the lane's largest score of row r.
  __device__ __forceinline__ void advance_maximum(int r, int top) {
    const float highest = quad_max(top == kMasked ? kLowest : (__int_as_float(top) - kRound) * c[r]);
    const float next = highest + b[r] <= kLargest ? b[r] : kAtMaximum - highest;
    const float alpha = exp2_approx(next - b[r]);
    b[r] = next;
    sum[r] *= alpha;
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      o[r / 2][j][r % 2 * 2] *= alpha;
      o[r / 2][j][r % 2 * 2 + 1] *= alpha;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int i = r % 2; i < 4; i += 2) weights[chunk][r / 2][i] = multiply_io2(weights[chunk][r / 2][i], to_io2(alpha, alpha));
    }
    set_offset(r);
    if (next == -kLowest) d[r] = 0.f;  // the row has seen no key: masked scores are to vanish beside d
  }

  // Weights of pair `i` of a chunk: what becomes register i % 4 of its A fragment.
  __device__ __forceinline__ void weigh(Weights& next, int chunk, int i) {
    const int m = i / 4, a = i % 4, r = 2 * m + a % 2;
    const int32_t* x = &scores[m][2 * chunk + a / 2][a % 2 * 2];
    const float first = exp2_approx(fmaf(__int_as_float(x[0]), c[r], d[r]));
    const float second = exp2_approx(fmaf(__int_as_float(x[1]), c[r], d[r]));
    sum[r] += first + second;
    next[chunk][m][a] = to_io2(first, second);
  }

  // Adds 16 channels of the product of a chunk's weights and the values of a stage to O.
  __device__ __forceinline__ void multiply_v(int chunk, int unit, uint32_t address) {
    uint32_t fragments[4];
    load_matrices_transposed(fragments, (address ^ unit % 4 * 32) + unit / 4 * 128 + chunk * 16 * kVRowBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_io(o[m][2 * unit + i], weights[chunk][m], fragments[2 * i], fragments[2 * i + 1]);
      }
    }
  }

  __device__ __forceinline__ void multiply_last(int stage) {
#pragma unroll
    for (int i = 0; i < kChunks * kUnits; ++i) multiply_v(i / kUnits, i % kUnits, v_lane + stage * kVTileBytes);
  }

  // Softmax of a step, P V of the one before, and Q K^T of the next one.
  __device__ __forceinline__ void attend_step(int step, int stage) {
    reduce(step);
    Weights next;
    constexpr int kAll = kChunks * kUnits, kAllPairs = kChunks * kPairs;
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
#pragma unroll
      for (int j = i * kAllPairs / kAll; j < (i + 1) * kAllPairs / kAll; ++j) weigh(next, j / kPairs, j % kPairs);
      multiply_v(i / kUnits, i % kUnits, v_lane + stage * kVTileBytes);
    }
    multiply_k_all(stage);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) weights[chunk][i / 4][i % 4] = next[chunk][i / 4][i % 4];
    }
  }

  // Zeroes the infinities and NaN of a stage's 16-bit V, which would reach even queries that do not see them;
  // add_nonfinite() gives them to those that do.
  __device__ __forceinline__ void clear_nonfinite(int stage) {
    constexpr uint32_t kExponent = SAGERT_IO_INFINITY;
    auto clear = [](uint32_t& pair) {
      if ((pair & kExponent) == kExponent) pair &= 0xffff0000u;
      if ((pair >> 16 & kExponent) == kExponent) pair &= 0xffffu;
    };
    uint4* tile = reinterpret_cast<uint4*>(s.v[stage]);
#pragma unroll 1
    for (int i = threadIdx.x; i < kVTileBytes / 16; i += kThreads) {
      uint4 x = tile[i];
      clear(x.x), clear(x.y), clear(x.z), clear(x.w);
      tile[i] = x;
    }
    __syncthreads();
  }

  // A stage holds what attend_step() needs: keys of the next step, values of the one before. The first step has no
  // weights yet for the values behind the tile's.
  __device__ __forceinline__ void copy(int step, int stage) {
    const Copies copies{p, s};
    if (step > 0) copies.copy_k(step - 1, stage);
    if (step >= -1 && step < s.tile.steps) copies.copy_v(step + 1, stage);
    async_copy_commit();
  }

  __device__ __forceinline__ void attend() {
    if (threadIdx.x == 0) Copies::begin(p, s, tile_at(p, blockIdx.x));
    __syncthreads();
    stage_all();
    int next = 0;  // stage of the next copy
    auto advance = [](int& x) { x = x + 1 == kStages ? 0 : x + 1; };
    int step = s.tile.steps;
#pragma unroll 1
    for (; next < kStages - 1; ++next) copy(step - next, next);
    begin();
    place();
    const bool v_bad = is_bad(1);
#pragma unroll
    for (int i = 0; i < kChunks * kPairs; ++i) weights[i / kPairs][i % kPairs / 4][i % 4] = 0;
    int stage = 0;
#pragma unroll 1
    for (; step >= 0; --step) {
      async_copy_wait_group<kStages - 2>();
      __syncthreads();
      copy(step - (kStages - 1), next);
      advance(next);
      if (v_bad) clear_nonfinite(stage);
      if (step < steps) {
        attend_step(step, stage);
      } else if (step == steps) {
        multiply_k_all(stage);
      }
      advance(stage);
    }
    async_copy_wait_group<0>();
    __syncthreads();
    if (v_bad) clear_nonfinite(stage);
    multiply_last(stage);
    write();
  }
};

}  // namespace sagert
