// SPDX-License-Identifier: Apache-2.0
// The schedule for products that become part of O outside the tensor core: those of a step of keys come in integers (V
// in INT8), or in a type too coarse to hold O. A warp takes one step after the other; the block's other warps compute
// while it waits.
//
// P in unsigned bytes has the row's largest weight in each step at 255, V a scale per step and channel: in each step
// both use all their bits. The weights' sums are those of the bytes.
#pragma once

#include "serial.cuh"

namespace sagert {

// Bytes are the last bits of subnormal numbers of fp16, of which log2(255) is in units of the integer.
constexpr float kLog2PMax = 7.994353436858858f - 24.f;
constexpr float kPStep = 1.f / 255.f;
constexpr bool kRowFirst = kChannels <= 128;  // registers are too short for it beyond
constexpr int kParts = kStep / 32;            // of 32 keys, that an instruction takes
constexpr int kOffsetSteps = 256;             // behind which O loses what it has too much
// Of a step with even blocks, behind which tiles of 8 channels what follows stands: ptxas spills elsewhere, or is
// slower.
constexpr int kCopyTile = 4, kSumTile = 6, kHoldTile = 7;
using Weights = uint32_t[kParts][kM][4];  // A fragments of P V

struct FoldWarp : SerialWarp<FoldWarp> {
  using SerialWarp::SerialWarp;
  Weights weights;

  // The lane's largest score of row r in the unit of the exponent, rounded up.
  __device__ __forceinline__ float own_highest(int r) const {
    if constexpr (kInt4) return row_highest(r);
    const int top = row_top(r);
    return top == kMasked ? kLowest : __fmul_ru(__int_as_float(top) - kRound, c[r]);
  }

  // Exponents' factors and the bytes' units. All roundings go down, so that no exponent is above log2(255): a byte
  // would carry.
  __device__ __forceinline__ void reduce_step(int stage, float k_scale) {
    if constexpr (kInt4) add_bias(stage, k_scale);
    int t = threadIdx.x;
    forget(t);
    float q_scale[kR], highest[kR], weight[kR];
    const uint32_t rows = base + (t >> 2) * (4 * kR);
    load_shared(q_scale, SAGERT_AT(rows, q_scale));
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      if constexpr (!kInt4) c[r] = fmaxf(q_scale[r] * k_scale, kLeastScale);
      highest[r] = quad_max(own_highest(r));
    }
    load_shared(b, SAGERT_AT(rows, maximum));
    bool within = true;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      d[r] = __fsub_rd(kLog2PMax, highest[r]);
      if constexpr (!kInt4) d[r] = __fmaf_rd(-kRound, c[r], d[r]);
      if (highest[r] == kLowest) d[r] = 0.f;  // no key is seen: masked scores are to vanish beside d
      within = within & highest[r] + b[r] <= kLargest;
    }
    if (__any_sync(~0u, !within | (!kInt4 && unit() > kCoarse))) {
#pragma unroll
      for (int r = 0; r < kR; ++r) advance_unit(r, highest[r]);
      __syncwarp();  // all four lanes of a row have read the maximum
      if ((t & 3) == 0) store_shared(SAGERT_AT(rows, maximum), b);
      if (!kInt4 && __any_sync(~0u, unit() > kCoarse)) {
#pragma unroll
        for (int r = 0; r < kR; ++r) set_exponents(r, row_top(r), own_highest(r) - highest[r] + kLog2PMax);
      }
    }
    // A byte's unit, relative to the maximum that O refers to, with two bits less: kRound times it is exact.
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      weight[r] = exp2_approx(highest[r] + b[r]) * kPStep;
      if constexpr (kRowFirst) weight[r] = __uint_as_float(__float_as_uint(weight[r]) & ~3u);
    }
    if ((t & 3) == 0) store_shared(SAGERT_AT(rows, weight), weight);
    __syncwarp();
  }

  static __device__ __forceinline__ void scale_shared(uint32_t place, float factor) {
    store_shared_f32(place, load_shared_f32(place) * factor);
  }

  __device__ __forceinline__ void advance_unit(int r, float highest) {
    const float next = highest + b[r] <= kLargest ? b[r] : -highest;
    const float alpha = exp2_approx(next - b[r]);
    b[r] = next;
    if constexpr (kEvenV) {
      scale_shared(sums() + 4 * r, alpha);
    } else {
      sum[r] *= alpha;
    }
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      o[r / 2][j][r % 2 * 2] *= alpha;
      o[r / 2][j][r % 2 * 2 + 1] *= alpha;
    }
    if (kEvenV && quad() == 0) scale_shared(offsets() + 4 * r, alpha);
  }

  // O without what it has too much, in other units: scale_of(j) gives those of channels 8 j + 2 quad + {0, 1}.
  template <typename F>
  __device__ __forceinline__ void change_units(F scale_of) {
    float offset[kR];
    __syncwarp();  // the first lanes have stored them
    load_shared(offset, offsets());
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      const float2 scale = scale_of(j);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        float* x = &o[r / 2][j][r % 2 * 2];
        x[0] = (x[0] - offset[r]) * scale.x;
        x[1] = (x[1] - offset[r]) * scale.y;
      }
    }
    __syncwarp();  // all four lanes of a row have read them
    constexpr float kNone[kR] = {};
    if (quad() == 0) store_shared(offsets(), kNone);
  }

  // Bytes of register `i` of the A fragment of a part.
  __device__ __forceinline__ void weigh(int part, int m, int i) {
    const int r = 2 * m + i % 2;
    uint32_t pairs[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int32_t* x = &scores[m][4 * part + i / 2 * 2 + n][i % 2 * 2];
      const float first = exp2_approx(fmaf(__int_as_float(x[0]), c[r], d[r]));
      const float second = exp2_approx(fmaf(__int_as_float(x[1]), c[r], d[r]));
      pairs[n] = to_fp16x2(first, second);
    }
    weights[part][m][i] = __byte_perm(pairs[0], pairs[1], 0x6420);
  }

  // Adds the bytes to the rows' sums.
  __device__ __forceinline__ void sum_weights(const float (&weight)[kR]) {
    uint32_t bytes[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r) bytes[r] = kMagic;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4 * kM; ++i) {
        uint32_t& x = bytes[i / 4 * 2 + i % 2];
        x = __dp4a(weights[part][i / 4][i % 4], 0x01010101u, x);
      }
    }
    if constexpr (kEvenV) load_shared(sum, sums());
#pragma unroll
    for (int r = 0; r < kR; ++r) sum[r] = fmaf(__uint_as_float(bytes[r]) - kRound, weight[r], sum[r]);
    if constexpr (kEvenV) store_shared(sums(), sum);
  }

  using Products = int32_t[kM][4];

  // Products of 8 channels, from `first` on.
  __device__ __forceinline__ void multiply_v(Products& products, int j, uint32_t address, const uint32_t (&first)[4]) {
#pragma unroll
    for (int part = 0; part < kParts; part += 2) {
      uint32_t fragments[4];
      load_matrices(fragments, address + part / 2 * (kBlock * kHeadDim) + j * 8 * kVRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (part == 0) {
          mma_u8s8(products[m], weights[0][m], fragments[0], fragments[1],
                   reinterpret_cast<const int32_t (&)[4]>(first));
        } else {
          mma_u8s8(products[m], weights[part][m], fragments[0], fragments[1], products[m]);
        }
      }
#pragma unroll
      for (int n = 0; n < kM; ++n) {
        const int m = kEvenV ? kM - 1 - n : n;  // ptxas' order is better so
        mma_u8s8(products[m], weights[part + 1][m], fragments[2], fragments[3], products[m]);
      }
    }
  }

  // Products of 8 channels, from kRound on, to O. With the row's factor first, what kRound gives is the same for all
  // channels.
  __device__ __forceinline__ void add_products(int j, uint32_t address, uint32_t scales, const float (&weight)[kR]) {
    const float scale[2] = {__uint_as_float(scales << 16), __uint_as_float(scales & 0xffff0000u)};
    constexpr uint32_t magic[4] = {kMagic, kMagic, kMagic, kMagic};
    Products products;
    multiply_v(products, j, address, magic);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = __int_as_float(products[m][i]), w = weight[2 * m + i / 2], v = scale[i % 2];
        if constexpr (kRowFirst) {  // both products with kRound are exact, the scale's in bf16 too
          o[m][j][i] = fmaf(fmaf(x, w, -kRound * w), v, o[m][j][i]);
        } else {
          o[m][j][i] = fmaf(fmaf(x, v, -kRound * v), w, o[m][j][i]);
        }
      }
    }
  }

  // Of a block that is not even, the scales of channels 8 j + 2 quad + {0, 1}.
  __device__ __forceinline__ float2 scales_of(int slot, int j) const {
    int t = threadIdx.x;
    forget(t);
    const uint32_t scales = SAGERT_AT(base, v_scale) + stage_of(slot) * kHeadDim * 2 + (t & 3) * 16;
    const uint32_t pair = __float_as_uint(load_shared_f32(scales + j / 4 * 64 + j % 4 * 4));
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }

  // The factor of an even block. The first scale of another is positive, and this is not.
  __device__ __forceinline__ float factor_of(int slot) const {
    forget(slot);
    return -load_shared_f32(SAGERT_AT(base, v_scale) + stage_of(slot) * kHeadDim * 2);
  }

  // All lanes agree: as a vote the compiler knows.
  __device__ __forceinline__ bool is_even(int slot) const { return __all_sync(~0u, factor_of(slot) > 0.f); }

  // While a block is added that is not even, O has that block's units. In front of the step, where registers are free.
  __device__ __forceinline__ void take_units_of(int slot) {
    change_units([&](int j) {
      const float2 scale = scales_of(slot, j);
      return make_float2(reciprocal_approx(scale.x), reciprocal_approx(scale.y));
    });
  }

  // P V of a step where blocks of V may be even. What kRound gives stays in O, and is noted: it is the same for all of
  // a row's channels. The next step, whose V8 is -V, has -weights, which takes back most of it.
  __device__ __forceinline__ void add_even_products(int slot, uint32_t v_address, const float (&weight)[kR]) {
    float factor = factor_of(slot), unit[kR];
    if (!(factor > 0.f)) factor = 1.f;
    factor = __int_as_float(__float_as_int(factor) ^ slot << 31);
#pragma unroll
    for (int r = 0; r < kR; ++r) unit[r] = weight[r] * factor;
    if (quad() == 0) {
      const uint32_t place = offsets();
      float offset[kR];
      load_shared(offset, place);
#pragma unroll
      for (int r = 0; r < kR; ++r) offset[r] = fmaf(kRound, unit[r], offset[r]);
      store_shared(place, offset);
    }
    uint32_t magic[4];
    load_shared(magic, base + kMagicAt);
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      Products products;
      multiply_v(products, j, v_address, magic);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          o[m][j][i] = fmaf(__int_as_float(products[m][i]), unit[2 * m + i / 2], o[m][j][i]);
        }
      }
      if (j == kCopyTile) copy_next(step_of(slot), slot);
      if (j == kSumTile) sum_weights(weight);
      if (j == kHoldTile) hold(products[0][0] == ~0);
    }
  }

  __device__ __forceinline__ void attend_step(int step, int slot) {
    if constexpr (kEvenV) {
      if (slot % kOffsetSteps == kOffsetSteps - 1) {
        change_units([](int) { return make_float2(1.f, 1.f); });  // so that what O has too much stays small beside it
      }
      if (!is_even(slot)) take_units_of(slot);
    }
    const float k_scale = load_k_scale(step);
    const int stage = stage_of(slot);
    multiply_k(stage);
    mask(step);
    reduce_step(stage, k_scale);
#pragma unroll
    for (int i = 0; i < kParts * 4 * kM; ++i) {
      const int part = i / (4 * kM);
      kEvenV ? weigh(part, i / 4 % kM, i % 4 ^ 1) : weigh(part, i % kM, i / kM % 4);  // as ptxas' order is best
    }
    if constexpr (!kEvenV && (kChannels > 64 || kStepBlocks > 1)) hold(weights[kParts - 1][kM - 1][3] == ~0u);
    int t = threadIdx.x;
    forget(t);
    float weight[kR];
    load_shared(weight, SAGERT_AT(base, weight) + (t >> 2) * (4 * kR));
    if constexpr (kEvenV) {
      add_even_products(slot, v_lane(stage), weight);
      if (!is_even(slot)) change_units([&](int j) { return scales_of(slot, j); });
      return;
    }
    const uint32_t v_address = v_lane(stage);
    const uint32_t scales = SAGERT_AT(base, v_scale) + stage * kHeadDim * 2 + (threadIdx.x & 3) * 16;
    sum_weights(weight);
#pragma unroll
    for (int j = 0; j < kChannelTiles; j += 4) {
      float four[4];
      load_shared(four, scales + j * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) add_products(j + i, v_address, __float_as_uint(four[i]), weight);
      if (j == 0) copy_next(step, slot);
      if (kChannels == 96 && j == 0) hold(o[0][0][0] == kLowest);
    }
  }
};

}  // namespace sagert
