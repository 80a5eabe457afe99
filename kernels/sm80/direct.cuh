// SPDX-License-Identifier: Apache-2.0
// The schedule for products that the tensor core can add to O itself: of V in 16 bits. While a warp exponentiates 16
// keys, the tensor core has P V of the 16 before; while it looks for the row maxima and exponentiates a step's first
// keys, P V of the last step's last.
#pragma once

#include "serial.cuh"

namespace sagert {

constexpr int kChunks = kStep / 16;        // of 16 keys
constexpr int kUnits = kChannelTiles / 2;  // parts of a chunk's P V, 16 channels each
constexpr int kPairs = 4 * kM;             // of scores that a lane has of a chunk
using Weights = uint32_t[kM][4];           // A fragments of a chunk's P V
static_assert(kTailKeys == 16, "the tail is a chunk");
// In front of the products they stand beside: where ptxas' order is better so.
constexpr bool kWeightsFirst = kHeadDim == 128 && !kCausal;

struct DirectWarp : SerialWarp<DirectWarp> {
  using SerialWarp::SerialWarp;
  Weights weights[kChunks];
  Weights tail;  // of the last chunk of the step before

  // Weights of pair `i` of a chunk: what becomes register i % 4 of its A fragment.
  __device__ __forceinline__ void weigh(int chunk, int i) {
    const int m = i / 4, a = i % 4, r = 2 * m + a % 2;
    const float2 two = weigh_two(r, &scores[m][2 * chunk + a / 2][a % 2 * 2]);
    weights[chunk][m][a] = to_io2(two.x, two.y);
  }

  // Adds to O the product of a chunk's weights with 16 channels of the values `behind` bytes behind `address`.
  __device__ __forceinline__ void multiply_v(const Weights& w, int unit, uint32_t address, uint32_t behind = 0) {
    if constexpr (!kSwizzleOnce) address += behind, behind = 0;
    uint32_t fragments[4];
    load_matrices_transposed(fragments, (address ^ unit % 4 * 32) + unit / 4 * 128 + behind);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kM; ++m) mma_io(o[m][2 * unit + i], w[m], fragments[2 * i], fragments[2 * i + 1]);
    }
  }

  // Zeros stand in for the step before the first.
  __device__ __forceinline__ void start(int slot) {
#pragma unroll
    for (int m = 0; m < kM; ++m) tail[m][0] = tail[m][1] = tail[m][2] = tail[m][3] = 0;
    uint4* values = reinterpret_cast<uint4*>(s.v_tail[(slot - kNextSlot) & (kTails - 1)]);
#pragma unroll 1
    for (int i = threadIdx.x; i < kTailBytes / 16; i += kThreads) values[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void finish() {
    const uint32_t address = v_lane_at(tail_at(base, 0));
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) multiply_v(tail, unit, address);
  }

  __device__ __forceinline__ void scale_tail(int r, float alpha) {
#pragma unroll
    for (int i = r % 2; i < 4; i += 2) {
      uint32_t& pair = tail[r / 2][i];
      pair = to_io2(low_io(pair) * alpha, high_io(pair) * alpha);
    }
  }

  // `settled`: it is known to be settled.
  template <bool settled = false>
  __device__ __forceinline__ void attend_step(int step, int& slot) {
    const float k_scale = load_k_scale(step);
    const int stage = stage_of(slot);
    const uint32_t tail_address = tail_lane(slot - kNextSlot);
    auto skips = [&] { return settled || (!kApart && is_settled(slot)); };
    multiply_k(stage);
    if (!skips()) mask(step);
#pragma unroll
    for (int unit = 0; unit < kUnits / 2; ++unit) multiply_v(tail, unit, tail_address);
    if (skips()) {
      set_scales<false>(k_scale);
    } else if (reduce(stage, k_scale, [&](int r, float alpha) { scale_tail(r, alpha); })) {
      if (kBounded && settles(step)) slot += kSettled;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) weigh(0, kWeightsFirst ? i ^ 1 : i);
#pragma unroll
    for (int unit = kUnits / 2; unit < kUnits; ++unit) multiply_v(tail, unit, tail_address);
    if constexpr (!kApart) copy_next(step, slot);
    const uint32_t v_address = v_lane(stage);
#pragma unroll
    for (int chunk = 0; chunk + 1 < kChunks; ++chunk) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        if constexpr (!kWeightsFirst) multiply_v(weights[chunk], unit, v_address, chunk * 16 * kVRowBytes);
#pragma unroll
        for (int i = unit * kPairs / kUnits; i < (unit + 1) * kPairs / kUnits; ++i) weigh(chunk + 1, i);
        if constexpr (kWeightsFirst) multiply_v(weights[chunk], unit, v_address, chunk * 16 * kVRowBytes);
      }
      if (kChannels >= 96 && chunk == 0) hold(sum[0] < 0.f);
      if (kApart && chunk == 0) copy_next(step, slot);
    }
#pragma unroll
    for (int i = 0; i < 4 * kM; ++i) tail[i / 4][i % 4] = weights[kChunks - 1][i / 4][i % 4];
  }
};

}  // namespace sagert
