// SPDX-License-Identifier: Apache-2.0
// The schedule for products that the tensor core can add to O itself: of V in 16 bits. While a warp exponentiates 16
// keys, the tensor core has P V of the 16 before.
#pragma once

#include "serial.cuh"

namespace sagert {

constexpr int kChunks = kStep / 16;        // of 16 keys
constexpr int kUnits = kChannelTiles / 2;  // parts of a chunk's P V, 16 channels each
constexpr int kPairs = 4 * kM;             // of scores that a lane has of a chunk
using Weights = uint32_t[kChunks][kM][4];  // A fragments of P V

struct DirectWarp : SerialWarp<DirectWarp> {
  using SerialWarp::SerialWarp;
  Weights weights;

  // Weights of pair `i` of a chunk: what becomes register i % 4 of its A fragment.
  __device__ __forceinline__ void weigh(int chunk, int i) {
    const int m = i / 4, a = i % 4, r = 2 * m + a % 2;
    const float2 two = weigh_two(r, &scores[m][2 * chunk + a / 2][a % 2 * 2]);
    weights[chunk][m][a] = to_io2(two.x, two.y);
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

  __device__ __forceinline__ void attend_step(int step, int stage) {
    const float k_scale = load_k_scale(step);
    multiply_k(stage);
    mask(step);
    reduce(stage, k_scale);
    const uint32_t v_address = v_lane(stage);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) weigh(0, i);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        uint32_t fragments[4];
        load_v(fragments, chunk, unit, v_address);
        multiply_v(fragments, chunk, unit);
        if (chunk + 1 < kChunks) {
#pragma unroll
          for (int i = unit * kPairs / kUnits; i < (unit + 1) * kPairs / kUnits; ++i) weigh(chunk + 1, i);
        }
      }
      if (kChannels >= 96 && chunk == 0) hold();
      if (chunk == 0) copy_next(step - kAhead);
    }
  }
};

}  // namespace sagert
