// SPDX-License-Identifier: Apache-2.0
// The schedule for products that the tensor core can add to O itself (V in 16 bits): beside the exponentials of a step
// goes Q K^T of the next one, beside its maxima P V of the step. The branches between, for masks and for maxima that
// move, keep the compiler from parting what belongs together.
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

struct DirectWarp : Warp {
  using Warp::Warp;
  float c[kR], d[kR];  // exponents of the step's scores' bits are c * bits + d
  Weights weights;

  __device__ __forceinline__ void set_offset(int r) { d[r] = fmaf(-kRound, c[r], b[r]); }

  // Exponents' factors of a step, and the row maxima, which move only where a score is too far above them.
  __device__ __forceinline__ void reduce(int step, float k_scale) {
    int t = threadIdx.x;
    forget(t);
    float q_scale[kR], x[kR];
    const uint32_t rows = base + (t >> 2) * (4 * kR);
    load_shared(q_scale, SAGERT_AT(rows, q_scale));
    load_shared(b, SAGERT_AT(rows, maximum));
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      c[r] = fmaxf(q_scale[r] * k_scale, kLeastScale);
      set_offset(r);
      x[r] = fmaf(__int_as_float(row_top(r)), c[r], d[r]);
    }
#pragma unroll
    for (int r = 1; r < kR; ++r) x[0] = fmaxf(x[0], x[r]);
    if (__any_sync(~0u, x[0] > kLargest) && step >= 0) {
#pragma unroll
      for (int r = 0; r < kR; ++r) advance_maximum(r, row_top(r));
      if ((t & 3) == 0) store_shared(SAGERT_AT(rows, maximum), b);
      __syncwarp();
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
    set_offset(r);
    if (next == -kLowest) d[r] = 0.f;  // the row has seen no key: masked scores are to vanish beside d
  }

  // Weights of pair `i` of a chunk: what becomes register i % 4 of its A fragment.
  __device__ __forceinline__ void weigh(int chunk, int i) {
    const int m = i / 4, a = i % 4, r = 2 * m + a % 2;
    const int32_t* x = &scores[m][2 * chunk + a / 2][a % 2 * 2];
    const float first = exp2_approx(fmaf(__int_as_float(x[0]), c[r], d[r]));
    const float second = exp2_approx(fmaf(__int_as_float(x[1]), c[r], d[r]));
    sum[r] += first;
    sum[r] += second;
    weights[chunk][m][a] = to_io2(first, second);
  }

  // Values of 16 channels and a chunk of keys.
  static __device__ __forceinline__ void load_v(uint32_t (&fragments)[4], int chunk, int unit, uint32_t address) {
    load_matrices_transposed(fragments, (address ^ unit % 4 * 32) + unit / 4 * 128 + chunk * 16 * kVRowBytes);
  }

  // Adds their product with the chunk's weights to O.
  __device__ __forceinline__ void multiply_v(const uint32_t (&fragments)[4], int chunk, int unit) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_io(o[m][2 * unit + i], weights[chunk][m], fragments[2 * i], fragments[2 * i + 1]);
      }
    }
  }

  // A step, whose maxima are known: its weights and their product with the values, and the scores of the step below.
  __device__ __forceinline__ void attend_step(int step, int stage) {
    const float k_scale = load_k_scale(step - 1);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) weigh(chunk, i);
    }
    multiply_k(stage);
    const uint32_t v_address = v_lane + stage * kVTileBytes;
    uint32_t fragments[4];
    load_v(fragments, 0, 0, v_address);
    mask(step - 1);
#pragma unroll
    for (int i = 0; i < kChunks * kUnits; ++i) {
      if (i > 0) load_v(fragments, i / kUnits, i % kUnits, v_address);
      multiply_v(fragments, i / kUnits, i % kUnits);
      if (i == kUnits / 2) copy_next(step - kAhead);
    }
    reduce(step - 1, k_scale);
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
  }

  // A stage holds a step's values and the keys of the step below it.
  static __device__ __forceinline__ int stage_of(int step) { return step & (kStages - 1); }

  __device__ __forceinline__ Copies copies() const {
    int thread = threadIdx.x;
    forget(thread);  // what depends on it would take registers over all steps
    return {p, base, static_cast<unsigned>(thread)};
  }

  __device__ __forceinline__ void copy(int step) {
    copies().copy_k(step - 1, stage_of(step));
    copies().copy_v(step, stage_of(step));
    async_copy_commit();
  }

  __device__ __forceinline__ void copy_next(int step) {
    copies().copy(step - 1, step, stage_of(step));
    async_copy_commit();
  }

  // The scores of the warp's first step, whose keys are in the stage of `step`.
  __device__ __forceinline__ void start(int step) {
    const float k_scale = load_k_scale(step - 1);
    multiply_k(stage_of(step));
    mask(step - 1);
    reduce(step - 1, k_scale);
  }

  __device__ __forceinline__ void attend() {
    if (threadIdx.x == 0) Copies::begin(p, s, tile_at(p, blockIdx.x));
    __syncthreads();
    float scale[kR];
    if (!p.q_vec) stage_all(scale);
    int step = s.tile.steps;
    // The last keys may be missing only in the steps copied here.
#pragma unroll 1
    for (int i = 0; i <= kAhead; ++i) copy(step - i);
    begin(scale);
    place();
    store_shared(SAGERT_AT(base, maximum) + threadIdx.x / 4 * (4 * kR), b);
    __syncwarp();
    const bool v_bad = is_bad(1);
    async_copy_wait_group<kAhead>();
    __syncthreads();
    if (step == steps) start(step);
#pragma unroll 1
    for (--step; step >= 0; step -= kBarrier) {
      async_copy_wait_group<kAhead - kBarrier>();
      __syncthreads();
      if (v_bad) {
#pragma unroll
        for (int i = 0; i < kBarrier; ++i) clear_nonfinite(stage_of(step - i));
        __syncthreads();
      }
#if UNROLL
#pragma unroll
#else
#pragma unroll 1
#endif
      for (int i = 0; i < kBarrier; ++i) {
        const int now = step - i;
        if (!kCausal || __all_sync(~0u, now < steps)) {
          attend_step(now, stage_of(now));
        } else {
          copy_next(now - kAhead);
          if (now == steps) start(now);
        }
      }
    }
    async_copy_wait_group<0>();
    load_shared(b, SAGERT_AT(base, maximum) + threadIdx.x / 4 * (4 * kR));
    write();
  }
};

}  // namespace sagert
