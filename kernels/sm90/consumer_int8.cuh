// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup with P V in integers: P in unsigned bytes scaled by the row's maximum in each block of keys, V
// in signed bytes with a scale per block and channel.
//
// It holds the scores of one block: the products take the registers that a second block of scores would. A step issues
// Q K^T of its block and, right behind it, P V of the block before, which runs under the exponentials.
#pragma once

#include "consumer_base.cuh"
#include "ptx/prefetch.cuh"

namespace sagert {

constexpr float kLog2PMax = 7.994353436858858f;  // log2(255)
constexpr float kPStep = 1.f / 255.f;
constexpr float kCoarsest = 0x1p-20f;  // a smaller scale could leave a masked key some weight; its step is negligible

// Exponents of a block of keys are c * (score - its thread's top + kRound) + b. No rounding lifts one above log2(255),
// which would carry out of the byte, because differences are taken on integers and b is rounded down.
struct Scaling {
  float c[2], b[2];
  int shift[2];    // brings a score to the bits of score - top + kRound
  float alpha[2];  // what the block's maximum costs the sums so far
};

struct Consumer : ConsumerBase {
  Scores scores;  // integers, then, in the first quarter, P
  int32_t products[kHeadDim / 2];
  int32_t weights[kBlock / 8];  // P of the block before
  float maximum[2];             // so far, which l and O refer to
  float weight[2];              // of the block before: its bytes' unit, relative to the maximum so far

  uint32_t v_last = kStagesV - 1;  // stage of the block of V before

  using ConsumerBase::ConsumerBase;

  // This thread's part of a row's sum of exponentials before they are bytes, in shared memory for want of registers. l
  // is the sum of the bytes, which is what V is multiplied by.
  __device__ __forceinline__ float& exact_sum(int r) { return s.exact_sums[r][thread_index() - 128]; }

  // Takes the next block of V, which then is the one before.
  __device__ __forceinline__ void take_v(bool ready) {
    if (!ready) mbarrier_wait(full_v(), v.parity);
    v_last = v.stage;
    v.advance();
  }

  // Gives back the block of V before the present one, the last one of the tile before included.
  __device__ __forceinline__ void give_back_v() { mbarrier_arrive_once(shared_address(&s.empty_v[v_last])); }

  // P V of the block taken last.
  __device__ __forceinline__ void issue_pv() {
    const uint64_t b = operand_behind(v_operand, v_last * kVStageBytes);
    wgmma_fence();
    const uint32_t* a = reinterpret_cast<const uint32_t*>(weights);
    wgmma_u8s8<0>(products, a, b);
#pragma unroll
    for (int i = 1; i < kBlock / 32; ++i) wgmma_u8s8<1>(products, a + 4 * i, operand_behind(b, 32 * i));
    wgmma_commit();
  }

  // Scales of V in a block, a pair of channels in each word; this thread's are every fourth vector from `quad` on.
  __device__ __forceinline__ const uint4* v_scales_at(int block) {
    const int64_t index = static_cast<int64_t>(task().head_kv) * p.blocks + block;
    return reinterpret_cast<const uint4*>(p.v_scale + index * kHeadDim);
  }

  // Adds the products, each row's with its own weight, to O at the maximum that alpha leads to.
  __device__ __forceinline__ void add_products(const uint4* scales, const float (&alpha)[2]) {
    rescale(alpha);
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      const uint4 four = __ldg(scales + 4 * j + quad());
      const uint32_t pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t pair = pairs[i / 4];
        const float scale = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        float& x = o[16 * j + i];
        x = fmaf(static_cast<float>(products[16 * j + i]), scale * weight[i / 2 % 2], x);
      }
    }
  }

  // From this thread's largest score of a row: `top` units of c, or `mine`.
  __device__ __forceinline__ void scale_row(Scaling& z, int r, int top, float c, float mine, float& next_weight) {
    const float highest = quad_max(mine);
    const float next = fmaxf(maximum[r], highest);
    z.c[r] = c;
    z.b[r] = __fmaf_rd(-kRound, c, mine - highest + kLog2PMax);
    z.shift[r] = __float_as_int(kRound) - top;
    z.alpha[r] = exp2_approx(maximum[r] - next);
    next_weight = exp2_approx(highest - next) * kPStep;  // NaN where the query holds an infinity or a NaN
    maximum[r] = next;
  }

  // Of 22 bits, so that c * kRound is exact, and b cannot round the row's largest exponent below 0.
  __device__ __forceinline__ float row_scale(int r, float k_scale) {
    return __int_as_float(__float_as_int(s.q_scale[row() + 8 * r] * k_scale) & ~3);
  }

  __device__ __forceinline__ void reduce(Scaling& z, float k_scale, float (&next_weight)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int top = row_top(scores, r);
      const float c = row_scale(r, k_scale);
      scale_row(z, r, top, c, static_cast<float>(top) * c, next_weight[r]);
    }
  }

  // The same for a block with masks.
  __device__ __forceinline__ void reduce_masked(Scaling& z, float k_scale, float (&next_weight)[2], int block) {
    const uint32_t bad = bad_keys(block);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool undefined;
      int top = mask_row(scores, r, block, bad, undefined);
      float c = row_scale(r, k_scale);
      const bool unseen = top == kMasked;
      if (unseen) top = 0;  // masked scores stay far below it
      if (c < kCoarsest) {
        const float ratio = c * (1.f / kCoarsest);
        coarsen_row(scores, r, ratio);
        top = __float2int_rn(static_cast<float>(top) * ratio);
        c = kCoarsest;
      }
      pin(scores);
      scale_row(z, r, top, c, unseen ? kLowest : static_cast<float>(top) * c, next_weight[r]);
      if (undefined) next_weight[r] = nan();
    }
  }

  // Exponentials, rounded to bytes, and the sums of bytes. With `exact` also their sums before rounding, which the LSE
  // is made of. The scores' fragment is the A operand of P V when V's keys stand in pair order.
  template <bool exact>
  __device__ __forceinline__ void exponentiate(const Scaling& z, const float (&next_weight)[2], uint32_t (&sum)[2]) {
    float whole[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kBlock / 16; ++j) {
      auto byte = [&](int i) {
        const int r = i / 2 % 2;
        const float x = __int_as_float(scores[8 * j + i] + z.shift[r]);
        const float weight = exp2_approx(fmaf(x, z.c[r], z.b[r]));
        if constexpr (exact) whole[r] += weight;
        return __float_as_uint(weight + kRound);
      };
      const uint32_t upper = pack_low_bytes(byte(0), byte(1), byte(4), byte(5));
      const uint32_t lower = pack_low_bytes(byte(2), byte(3), byte(6), byte(7));
      sum[0] = __dp4a(upper, 0x01010101u, sum[0]);
      sum[1] = __dp4a(lower, 0x01010101u, sum[1]);
      scores[2 * j] = static_cast<int32_t>(upper);
      scores[2 * j + 1] = static_cast<int32_t>(lower);
    }
    if constexpr (exact) {
#pragma unroll
      for (int r = 0; r < 2; ++r) exact_sum(r) = fmaf(exact_sum(r), z.alpha[r], next_weight[r] * whole[r]);
    }
  }

  // Stands between exponentials and a wait: without a branch that depends on them, ptxas moves them below it.
  __device__ __forceinline__ void hold(const uint32_t (&sum)[2]) {
    if (__any_sync(~0u, sum[0] + sum[1] > 255 * kBlock)) __nanosleep(1);
  }

  __device__ __forceinline__ void attend(int turn) {
    begin(turn);
    // The first step takes P = 0 with whatever block of V came before.
#pragma unroll
    for (int i = 0; i < kBlock / 8; ++i) weights[i] = 0;
    maximum[0] = maximum[1] = kLowest;
    exact_sum(0) = exact_sum(1) = 0.f;
    weight[0] = weight[1] = 0.f;
    const int begin = uniform(task().begin), end = uniform(task().end);
    const int masked = end - static_cast<int>(uniform(task().masked));
    bool ready_k = false, ready_v = false;
#pragma unroll 1
    for (int block = end - 1; block >= begin; --block) {
      const float k_scale = next_k_scale();
      issue_qk(scores, ready_k);
      if (block < end - 1) take_v(ready_v);
      issue_pv();
      wgmma_wait<1>();
      pin(scores);
      release_k();
      // To L1, without registers: they are read when P V is there.
      const uint4* v_scales = v_scales_at(min(block + 1, end - 1));
      prefetch_l1(v_scales + threadIdx.x % (kHeadDim / 8));
      Scaling z;
      float next_weight[2];
      if (block >= masked) {
        reduce_masked(z, k_scale, next_weight, block);
      } else {
        reduce(z, k_scale, next_weight);
      }
      ready_k = k_ready();
      weight[0] *= z.alpha[0];
      weight[1] *= z.alpha[1];
      uint32_t sum[2] = {0, 0};
      if (p.write_lse) {
        exponentiate<true>(z, next_weight, sum);
      } else {
        exponentiate<false>(z, next_weight, sum);
      }
      hold(sum);
      wgmma_wait<0>();
      pin(products);
      pin(weights);
      add_products(v_scales, z.alpha);
      give_back_v();
      ready_v = v_ready();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        weight[r] = next_weight[r];
        l[r] = fmaf(l[r], z.alpha[r], weight[r] * static_cast<float>(sum[r]));
      }
#pragma unroll
      for (int i = 0; i < kBlock / 8; ++i) weights[i] = scores[i];
    }
    if (end > begin) {
      take_v(ready_v);
      issue_pv();
      wgmma_wait<0>();
      pin(products);
      pin(weights);
      add_products(v_scales_at(begin), {1.f, 1.f});
    }
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] = row_sum(l[r]);
      total[r] = p.write_lse ? row_sum(exact_sum(r)) : l[r];
    }
    write(maximum, total);
  }
};

}  // namespace sagert
