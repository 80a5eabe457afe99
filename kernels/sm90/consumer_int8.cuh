// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup with P V in integers: P in unsigned bytes scaled by the row's maximum in each block of keys, V
// in bytes with scales per block and channels, in the channels' units.
//
// Products become floating-point numbers without an instruction: they are made of unsigned bytes, stay below 2^23, and
// so are 2^149 times what their bits are as fp32, a subnormal number. For that V is raised by 128, and scales are
// multiplied by 2^100. What O then has too much is the same for all channels with the same scale. It is summed once for
// each such group; as odd blocks hold -V and have their factors' signs changed, little of it adds up.
//
// One block after the other, as in consumer.cuh: the products take the registers that the scores have left. While wgmma
// runs, instructions of fp32 are taken from the tensor core's time, those of 16 bits and of integers are not: hence the
// bytes by way of fp16.
#pragma once

#include "consumer_base.cuh"
#include "leading.cuh"
#include "ptx/prefetch.cuh"

namespace sagert {

// Bytes are the last bits of subnormal numbers of fp16, of which log2(255) is in units of the integer.
constexpr float kUnits = 0x1p24f, kLog2PMax = 7.994353436858858f - 24.f;
constexpr float kPStep = 1.f / 255.f;
constexpr float kSlack = 14.f;         // by which a block's maximum may exceed the one that O and the sums refer to
constexpr float kCoarsest = 0x1p-20f;  // a smaller scale could leave a masked key some weight; its step is negligible

constexpr float kLifted = 0x1p49f;  // what O is to be multiplied with: products have 2^-149, scales kVLift
static_assert(kVLift == 0x1p100f && kBlock * 255 * (kVRaise + 127) < 1 << 23);

// Exponents of a block of keys are c * (score - its thread's top + kRound) + b. No rounding lifts one above log2(255),
// which would carry out of the byte, because differences are taken on integers and b is rounded down.
struct Scaling {
  float c[2], b[2];
  int shift[2];  // brings a score to the bits of score - top + kRound
};

struct Consumer : ConsumerBase {
  Scores scores;  // integers, then, in the first quarter, P
  int32_t products[kHeadDim / 2];
  Totals kept;

  using ConsumerBase::ConsumerBase;

  // The maximum of this thread's row r that l and O refer to, in shared memory for want of registers.
  __device__ __forceinline__ float& maximum(int r) { return s.maxima[r][thread_index() - 128]; }

  // This thread's part of a row's sum of exponentials before they are bytes, in shared memory for want of registers. l
  // is the sum of the bytes, which is what V is multiplied by.
  __device__ __forceinline__ float& exact_sum(int r) { return s.exact_sums[r][thread_index() - 128]; }

  // At head_dim 128 in shared memory for want of registers.
  __device__ __forceinline__ Totals& totals() {
    if constexpr (kHeadDim == 128) return s.totals[thread_index() - 128];
    return kept;
  }

  // P V of the block.
  __device__ __forceinline__ void issue_pv() {
    const uint64_t b = operand_behind(v_operand, ring.stage * kVStageBytes);
    wgmma_fence();
    const uint32_t* a = reinterpret_cast<const uint32_t*>(scores);
    wgmma_u8u8<0>(products, a, b);
#pragma unroll
    for (int i = 1; i < kBlock / 32; ++i) wgmma_u8u8<1>(products, a + 4 * i, operand_behind(b, 32 * i));
    wgmma_commit();
  }

  // This lane's scales of V in a block.
  __device__ __forceinline__ const uint16_t* v_scales_at(int block) {
    const int64_t index = static_cast<int64_t>(task().head_kv) * p.blocks + block;
    return reinterpret_cast<const uint16_t*>(p.v_scale) + index * (kHeadDim / 2) + kHeadDim / 8 * quad();
  }

  static __device__ __forceinline__ float low_bf16(uint32_t two) { return __uint_as_float(two << 16); }
  static __device__ __forceinline__ float high_bf16(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }

  // Waits for P V, and takes no more of the block.
  __device__ __forceinline__ void end_pv() {
    wgmma_wait<0>();
    pin(products);
    pin_first<kBlock / 8>(scores);
    release_block();
  }

  // Adds P V, which is under way, to O, each row's in its own unit; `sum` are this thread's sums of bytes. What does
  // not need the products stands in front of a branch: behind it ptxas waits for them.
  __device__ __forceinline__ void add_products(int block, float (&unit)[2], const uint32_t (&sum)[2]) {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(v_scales_at(block)));
    uint32_t bytes = sum[0] | sum[1] << 16;
    bytes += __shfl_xor_sync(~0u, bytes, 1);
    bytes += __shfl_xor_sync(~0u, bytes, 2);
    const uint32_t sign = static_cast<uint32_t>(block) << 31;  // odd blocks hold -V
#pragma unroll
    for (int r = 0; r < 2; ++r) unit[r] = __uint_as_float(__float_as_uint(unit[r]) ^ sign);
    const float groups[kVGroups] = {low_bf16(four.x), high_bf16(four.x), low_bf16(four.y), high_bf16(four.y)};
    if (__any_sync(~0u, groups[0] < 0.f)) {
      add_uneven_products(block, unit, bytes);
      return;
    }
    end_pv();
    constexpr int kChannels = kHeadDim / 2 / kVGroups;  // of this thread, in both rows, in a group
#pragma unroll
    for (int group = 0; group < kVGroups; ++group) {
      const float factor[2] = {unit[0] * groups[group], unit[1] * groups[group]};
#pragma unroll
      for (int i = group * kChannels; i < (group + 1) * kChannels; ++i) {
        o[i] = fmaf(__int_as_float(products[i]), factor[i / 2 % 2], o[i]);
      }
    }
    const uint32_t two = quad() < 2 ? four.x : four.y;
    const float own = quad() % 2 == 0 ? low_bf16(two) : high_bf16(two);
#pragma unroll
    for (int r = 0; r < 2; ++r) totals().excess[r] = fmaf(raised(bytes, r), unit[r] * own, totals().excess[r]);
  }

  // Products of row r's bytes, whose sums are 16 bits each of `bytes`, with V's raise alone.
  static __device__ __forceinline__ float raised(uint32_t bytes, int r) {
    return __uint_as_float((r == 0 ? bytes & 0xffff : bytes >> 16) * kVRaise);
  }

  // The same where each pair of channels has its own scale, whose sign is changed.
  __device__ __forceinline__ void add_uneven_products(int block, const float (&unit)[2], uint32_t bytes) {
    end_pv();
    block += products[0] >> 31;  // 0, but ptxas cannot load scales before the products have come: registers are short
    const uint32_t* scales = reinterpret_cast<const uint32_t*>(v_scales_at(block));
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      const int place = scale_place(kHeadDim, j);
      const uint32_t two = __ldg(scales + place / 2);
      const float scale = place % 2 == 0 ? low_bf16(two) : high_bf16(two);
#pragma unroll
      for (int i = 4 * j; i < 4 * j + 4; ++i) {
        const float factor = unit[i / 2 % 2] * -scale;
        o[i] = fmaf(__int_as_float(products[i]), factor, fmaf(-raised(bytes, i / 2 % 2), factor, o[i]));
      }
    }
  }

  // Sums of P, and O without what it has too much.
  __device__ __forceinline__ void settle() {
    const Totals sums = totals();
    l[0] = sums.l[0], l[1] = sums.l[1];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const float excess = __shfl_sync(~0u, sums.excess[i / 2 % 2], i / (kHeadDim / 2 / kVGroups), kVGroups);
      o[i] = (o[i] - excess) * kLifted;
    }
  }

  // From this thread's largest score of a row: `top` units of c, or `mine`. `unit` becomes the row's.
  __device__ __forceinline__ void scale_row(Scaling& z, int r, int top, float c, float mine, float& unit) {
    const float highest = quad_max(mine);
    z.c[r] = c;
    z.b[r] = __fmaf_rd(-kRound, c, mine - highest + kLog2PMax);
    z.shift[r] = __float_as_int(kRound) - top;
    unit = highest;
  }

  // Units of the rows' bytes from the block's maxima, which they are given as. Moves the maxima that O and the sums
  // refer to where they are far below.
  __device__ __forceinline__ void refer(float (&unit)[2]) {
    float before[2];
    bool within = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      before[r] = maximum(r);
      within = within && !(unit[r] > before[r] + kSlack);
    }
    if (__any_sync(~0u, !within)) {
      float alpha[2];
      Totals& sums = totals();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float next = unit[r] > before[r] + kSlack ? unit[r] : before[r];
        alpha[r] = exp2_approx(before[r] - next);
        sums.l[r] *= alpha[r];
        sums.excess[r] *= alpha[r];
        if constexpr (EXACT_LSE) exact_sum(r) *= alpha[r];
        before[r] = maximum(r) = next;
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= alpha[i / 2 % 2];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) unit[r] = exp2_approx(unit[r] - before[r]) * kPStep;  // NaN where the query has one
  }

  // Of 22 bits, so that c * kRound is exact, and b cannot round the row's largest exponent below 0.
  __device__ __forceinline__ float row_scale(int r, float k_scale) {
    return __int_as_float(__float_as_int(s.q_scale[row() + 8 * r] * k_scale) & ~3);
  }

  __device__ __forceinline__ void reduce(Scaling& z, float k_scale, float (&unit)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int top = row_top(scores, r);
      const float c = row_scale(r, k_scale);
      scale_row(z, r, top, c, static_cast<float>(top) * c, unit[r]);
    }
    refer(unit);
  }

  // The same for a block with masks.
  __device__ __forceinline__ void reduce_masked(Scaling& z, float k_scale, float (&unit)[2], int block) {
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
      scale_row(z, r, top, c, unseen ? kLowest : static_cast<float>(top) * c, unit[r]);
      if (undefined) unit[r] = nan();
    }
    refer(unit);
  }

  // Exponentials, rounded to bytes, and the sums of bytes. With `exact` also their sums before rounding, which the LSE
  // is made of. The scores' fragment is the A operand of P V when V's keys stand in pair order.
  template <bool exact>
  __device__ __forceinline__ void exponentiate(const Scaling& z, const float (&unit)[2], uint32_t (&sum)[2]) {
    float whole[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kBlock / 16; ++j) {
      auto e = [&](int i) {
        const int r = i / 2 % 2;
        const float x = __int_as_float(scores[8 * j + i] + z.shift[r]);
        const float weight = exp2_approx(fmaf(x, z.c[r], z.b[r]));
        if constexpr (exact) whole[r] += weight;
        return weight;
      };
      auto two = [&](int i) { return to_fp16x2(e(i), e(i + 1)); };
      const uint32_t upper = __byte_perm(two(0), two(4), 0x6420), lower = __byte_perm(two(2), two(6), 0x6420);
      sum[0] = __dp4a(upper, 0x01010101u, sum[0]);
      sum[1] = __dp4a(lower, 0x01010101u, sum[1]);
      scores[2 * j] = static_cast<int32_t>(upper);
      scores[2 * j + 1] = static_cast<int32_t>(lower);
    }
    if constexpr (exact) {
#pragma unroll
      for (int r = 0; r < 2; ++r) exact_sum(r) = fmaf(unit[r] * kUnits, whole[r], exact_sum(r));
    }
  }

  __device__ __forceinline__ bool has_leading() const { return uniform(task().has_leading) != 0; }

  // Puts the leading keys' scores, which are in the first block, in shared memory. The block does without them.
  __device__ __forceinline__ void take_leading(float k_scale) {
    static_assert(kLeadingKeys == 4, "keys 0 and 1 are the first lane's of each quad, 2 and 3 the second's");
    if (2 * quad() >= kLeadingKeys) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        int& x = scores[n + 2 * r];
        s.leading[row() + 8 * r][2 * quad() + n] = static_cast<float>(x) * k_scale;
        x = kMasked;
      }
    }
  }

  // To L1: V's mean, and V of the leading keys.
  __device__ __forceinline__ void prefetch_leading() const {
    constexpr int kWords = mean_words(kHeadDim);
    const int word = thread_index() % 32 * 32;
    if (word < kWords) prefetch_l1(p.v_mean + mean_place() + word);
  }

  // Adds the leading keys: P in fp32 as their scores give it, times V in 16 bits.
  __device__ __forceinline__ void add_leading() {
    __syncwarp();  // lanes of the same warp have put them there
    float alpha[2], weight[2][kLeadingKeys];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int seen = kCausal ? min(p.seqlen_k, query(r) + 1) : p.seqlen_k;
      const float before = maximum(r);
      float next = before;
#pragma unroll
      for (int key = 0; key < kLeadingKeys; ++key) {
        weight[r][key] = key < seen ? s.leading[row() + 8 * r][key] * s.q_scale[row() + 8 * r] : -infinity();
        next = fmaxf(next, weight[r][key]);
      }
      maximum(r) = next;
      alpha[r] = exp2_approx(before - next);
      float sum = 0.f;
#pragma unroll
      for (int key = 0; key < kLeadingKeys; ++key) {
        weight[r][key] = exp2_approx(weight[r][key] - next);
        sum += weight[r][key];
      }
      const float once = quad() == 0 ? sum : 0.f;  // the quad's sums are added up
      l[r] = fmaf(l[r], alpha[r], once);
      if constexpr (EXACT_LSE) exact_sum(r) = fmaf(exact_sum(r), alpha[r], once);
    }
    const uint32_t* v = reinterpret_cast<const uint32_t*>(p.v_mean + mean_place() + leading_at(kHeadDim)) + quad();
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      float* x = o + 4 * j;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= alpha[i / 2];
#pragma unroll
      for (int key = 0; key < kLeadingKeys; ++key) {
        const uint32_t pair = __ldg(v + key * (kHeadDim / 2) + 4 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = fmaf(weight[i / 2][key], i % 2 == 0 ? low_io(pair) : high_io(pair), x[i]);
      }
    }
  }

  // All blocks this warpgroup sees, from the last one down.
  __device__ __forceinline__ void attend_blocks() {
    int masked = uniform(task().masked);
    const int begin = uniform(task().begin);
#pragma unroll 1
    for (int block = static_cast<int>(uniform(task().end)) - 1; block >= begin; --block) {
      const float k_scale = k_scale_at(block);
      prefetch_l1(v_scales_at(block));  // to L1, without registers: they are read when P V is there
      issue_qk(scores);
      wgmma_wait<0>();
      pin(scores);
      Scaling z;
      float unit[2];  // of the bytes, relative to the maximum so far
      if (block == 0 && has_leading()) take_leading(k_scale);
      if (masked > 0 || block == 0) {
        --masked;
        reduce_masked(z, k_scale, unit, block);
      } else {
        reduce(z, k_scale, unit);
      }
      wait_for_block();  // it has come: this keeps the compiler from mixing what is before with what is behind
      uint32_t sum[2] = {0, 0};
      exponentiate<EXACT_LSE>(z, unit, sum);
#pragma unroll
      for (int r = 0; r < 2; ++r) totals().l[r] = fmaf(unit[r], static_cast<float>(sum[r]), totals().l[r]);
      wait_for_block();  // likewise
      pin_first<kBlock / 8>(scores);
      issue_pv();
      int place = block;
      forget(place);  // a pointer would take registers over the exponentials
      add_products(place, unit, sum);
    }
  }

  __device__ __forceinline__ void attend() {
    prefetch_leading();
    maximum(0) = maximum(1) = kLowest;
    totals() = {};
    if constexpr (EXACT_LSE) exact_sum(0) = exact_sum(1) = 0.f;
    skip_blocks(uniform(task().skipped));
    attend_blocks();
    settle();
    if (uniform(task().begin) == 0 && uniform(task().end) != 0 && has_leading()) add_leading();
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] = row_sum(l[r]);
      total[r] = EXACT_LSE ? row_sum(exact_sum(r)) : l[r];
    }
    write({maximum(0), maximum(1)}, total);
  }
};

}  // namespace sagert
