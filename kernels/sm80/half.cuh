// SPDX-License-Identifier: Apache-2.0
// The schedule for V in fp16 on devices whose tensor cores take twice as long for sums in fp32: each step's products
// are summed in fp16, which V's scale keeps from overflowing, and added to O outside of the tensor core (SageAttention,
// arXiv 2410.02367).
#pragma once

#include "serial.cuh"

namespace sagert {

constexpr int kChunks = kStep / 16;        // of 16 keys
using Weights = uint32_t[kChunks][kM][4];  // A fragments of P V

struct HalfWarp : SerialWarp<HalfWarp> {
  using SerialWarp::SerialWarp;
  Weights weights;

  // Register `a` of the A fragment of a chunk.
  __device__ __forceinline__ void weigh(int chunk, int m, int a) {
    const int r = 2 * m + a % 2;
    const float2 two = weigh_two(r, &scores[m][2 * chunk + a / 2][a % 2 * 2]);
    weights[chunk][m][a] = to_fp16x2(two.x, two.y);
  }

  // Adds the products of 16 channels to O.
  __device__ __forceinline__ void multiply_v(int unit, uint32_t address) {
    uint32_t products[kM][2][2];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t fragments[4];
      load_matrices_transposed(fragments, (address ^ unit % 4 * 32) + unit / 4 * 128 + chunk * 16 * kVRowBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          constexpr uint32_t zero[2] = {0, 0};
          uint32_t (&sums)[2] = products[m][i];
          if (chunk == 0) {
            mma_f16_half(sums, weights[chunk][m], fragments[2 * i], fragments[2 * i + 1], zero);
          } else {
            mma_f16_half(sums, weights[chunk][m], fragments[2 * i], fragments[2 * i + 1], sums);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) add_halves(&o[m][2 * unit + i][2 * h], products[m][i][h]);
      }
    }
  }

  __device__ __forceinline__ void attend_step(int step, int slot) {
    const float k_scale = load_k_scale(step);
    const int stage = stage_of(slot);
    multiply_k(stage);
    mask(step);
    reduce(stage, k_scale);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < 4 * kM; ++i) weigh(chunk, i / 4, i % 4);
    }
    hold(sum[0] < 0.f);
    const uint32_t v_address = v_lane(stage);
#pragma unroll
    for (int unit = 0; unit < kChannelTiles / 2; ++unit) {
      multiply_v(unit, v_address);
      if (unit == 1) copy_next(step, slot);
    }
  }
};

}  // namespace sagert
