// SPDX-License-Identifier: Apache-2.0
// The schedule for V in FP8: P in e4m3 with 448 at a row's maximum (SageAttention2, arXiv 2411.10958). The tensor core
// adds with few bits, so each step's product is added to O outside of it: from fp32, or, where that is faster, from
// fp16, which V's scale keeps from overflowing (SageAttention2++, arXiv 2505.21136).
#pragma once

#include "ptx/half2.cuh"
#include "serial.cuh"

namespace sagert {

constexpr bool kHalfSums = ACCUMULATE != 0;
constexpr int kParts = kStep / 32;        // of 32 keys, that an instruction takes
using Weights = uint32_t[kParts][kM][4];  // A fragments of P V

struct Fp8Warp : SerialWarp<Fp8Warp> {
  using SerialWarp::SerialWarp;
  Weights weights;

  // Register `i` of the A fragment of a part.
  __device__ __forceinline__ void weigh(int part, int m, int i) {
    const int r = 2 * m + i % 2;
    uint16_t pairs[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 two = weigh_two(r, &scores[m][4 * part + i / 2 * 2 + n][i % 2 * 2]);
      pairs[n] = to_e4m3x2(two.x, two.y);
    }
    weights[part][m][i] = pack_halves(pairs[0], pairs[1]);
  }

  // Adds the products of 8 channels to O.
  __device__ __forceinline__ void multiply_v(int j, uint32_t address) {
    static_assert(kParts == 2, "a load brings 64 keys of 8 channels");
    uint32_t fragments[4];
    load_matrices(fragments, address + j * 8 * kVRowBytes);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if constexpr (kHalfSums) {
        uint32_t products[2];
        constexpr uint32_t zero[2] = {0, 0};
        mma_e4m3_half(products, weights[0][m], fragments[0], fragments[1], zero);
        mma_e4m3_half(products, weights[1][m], fragments[2], fragments[3], products);
#pragma unroll
        for (int h = 0; h < 2; ++h) add_halves(&o[m][j][2 * h], products[h]);
      } else {
        float products[4];
        constexpr float zero[4] = {0.f, 0.f, 0.f, 0.f};
        mma_e4m3(products, weights[0][m], fragments[0], fragments[1], zero);
        mma_e4m3(products, weights[1][m], fragments[2], fragments[3], products);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][j][i] += products[i];
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
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4 * kM; ++i) weigh(part, i / 4, i % 4);
    }
    hold(sum[0] < 0.f);
    const uint32_t v_address = v_lane(stage);
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      multiply_v(j, v_address);
      if (j == 2) copy_next(step, slot);
    }
  }
};

}  // namespace sagert
