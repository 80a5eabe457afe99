// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup: 64 queries against the blocks of keys, one block after the other. While it waits for the tensor
// core, the other warpgroups compute: with the registers of one block of scores three of them fit.
#pragma once

#include "consumer_base.cuh"
#include "exponential.cuh"
#include "half_sums.cuh"
#include "joint.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/prefetch.cuh"

namespace sagert {

// P's exponent at a row's maximum, log2(448) for e4m3, and the one above which a score moves the maximum. In e4m3 a
// row's largest weight is to be exact: it alone can have a tenth of the squared error. Rounding has lost nothing at the
// maximum yet when 2^-8 are added. Floats in 16 bits lose nothing by a margin, and fp16 holds up to 2^15.
constexpr float kAtMaximum = kV == V::kIo ? 8.f : 8.807354922057604f;
constexpr float kMargin = kV == V::kIo ? 6.f : 0x1p-8f;
constexpr float kLargest = kAtMaximum + kMargin;
constexpr float kHalfAtMaximum = kAtMaximum - 2.f;  // with sums in fp16
template <bool kHalf>
constexpr float kLimit = kHalf ? kHalfAtMaximum + kMargin : kLargest;
// O is divided by the sum of P as it is rounded: with weights that add up to 1 an offset of V is kept. The logarithm of
// the sum needs the exponentials themselves, which takes one addition for each.
constexpr bool kExactSums = kOnes == 0 || EXACT_LSE;
// Parts of a step: P V of one is issued while the next is exponentiated.
constexpr int kParts = kHeadDim == 64 && kV == V::kIo ? 4 : 2;
// Where registers are short the compiler must not move exponentials of one part before those of the other.
template <bool kHalf>
constexpr bool kWall = kHeadDim == 128 ? kV == V::kIo || EXACT_LSE : kSide != 0 && (!kHalf || EXACT_LSE);
// Where they are shorter still, the queries' scales stay in shared memory, K's scales have no pointer that stays, and a
// row has one sum of exponentials.
template <bool kHalf>
constexpr bool kFewRegisters = kV == V::kFp8 && (kHeadDim == 128 || kSide != 0) && (!kHalf || EXACT_LSE);
constexpr int kSums = kFewRegisters<true> ? 1 : 2;

template <int count>
__device__ __forceinline__ void wgmma_io(float (&d)[count], const uint32_t* a, uint64_t b) {
#if SAGERT_IO_BF16
  wgmma_bf16(d, a, b);
#else
  wgmma_f16(d, a, b);
#endif
}

struct Consumer : ConsumerBase {
  static constexpr int kWeights = kStep / (kV == V::kIo ? 4 : 8);  // registers of P
  using Factors = float[kPieces][2];                               // of the exponents, by rows

  Scores scores;         // integers, then the exponentials' bits, then, in the first registers, P
  HalfSums half;         // kHalfSums: of P V, in place of o, which they are brought to
  float b[2];            // exponents are c * score + b: -b is the maximum that the sums and O refer to
  float q_scale[2];      // unless kFewRegisters
  float sum[2 * kSums];  // kExactSums: of the exponentials, kSums for each row
  uint32_t pair_sum[2];  // kExactSums: of those in fp16, in one block

  using ConsumerBase::ConsumerBase;

  template <bool kHalf, int first, int last>
  __device__ __forceinline__ void issue_pv(int step) {
    const uint32_t* weights = reinterpret_cast<uint32_t*>(scores);
    const uint64_t b = operand_behind(v_operand, ring.stage * kVStageBytes);
    const uint64_t side = operand_behind(b, kVSlotBytes + (step & 1) * kSide);
    wgmma_fence();
    if constexpr (kV == V::kIo) {
#pragma unroll
      for (int i = first / 16; i < last / 16; ++i) {
        wgmma_io(o, weights + 4 * i, operand_behind(b, 16 * kMapWidth * 2 * i));
      }
    } else {
#pragma unroll
      for (int i = first / 32; i < last / 32; ++i) {
        const uint64_t v = i < kBlock / 32 ? operand_behind(b, 32 * i) : operand_behind(side, 32 * i - kBlock);
        if constexpr (kHalf) {
          wgmma_e4m3(half.sums, weights + 4 * i, v);
        } else {
          wgmma_e4m3(o, weights + 4 * i, v);
        }
      }
    }
    wgmma_commit();
  }

  template <bool kHalf>
  __device__ __forceinline__ float scale_of_row(int r) const {
    return kFewRegisters<kHalf> ? s.q_scale[row() + 8 * r] : q_scale[r];
  }

  __device__ __forceinline__ float bound_of_row(int r) const { return s.q_bound[row() + 8 * r]; }

  // No score of the warp's rows to come moves a maximum.
  __device__ __forceinline__ bool bounded() const {
    if constexpr (!kBounded) return false;
    const bool within = is_bounded(b[0], bound_of_row(0), kLargest) && is_bounded(b[1], bound_of_row(1), kLargest);
    return __all_sync(~0u, within);
  }

  // Scales of the exponents of a step that needs no maxima.
  template <bool kHalf>
  __device__ __forceinline__ void set_scales(Factors& c, const float (&k_scale)[kPieces]) const {
#pragma unroll
    for (int i = 0; i < 2 * kPieces; ++i) c[i / 2][i % 2] = scale_of_row<kHalf>(i % 2) * k_scale[i / 2];
  }

  // Scales of the exponents. Row maxima are taken on the integers: a thread's keys of a row share one scale. Says
  // whether a maximum has moved.
  template <bool kHalf>
  __device__ __forceinline__ bool reduce(Factors& c, const float (&k_scale)[kPieces]) {
    Factors top;
    set_scales<kHalf>(c, k_scale);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[piece][r] = static_cast<float>(row_top(scores, r, piece));
      }
    }
    auto exponent = [&](int r) {
      float x = fmaf(top[0][r], c[0][r], b[r]);
      if constexpr (kSide != 0) x = fmaxf(x, fmaf(top[kPieces - 1][r], c[kPieces - 1][r], b[r]));
      return x;
    };
    const bool within = exponent(0) <= kLimit<kHalf> && exponent(1) <= kLimit<kHalf>;
    if (!__any_sync(~0u, !within)) return false;
    if constexpr (kHalf) {
      advance_maxima(top, c);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) advance_maximum<kHalf>(r, largest_of(top, c, r));
    }
    return true;
  }

  // Largest score of row r, scaled.
  static __device__ __forceinline__ float largest_of(const Factors& top, const Factors& c, int r) {
    const float x = top[0][r] * c[0][r];
    return kSide == 0 ? x : fmaxf(x, top[kPieces - 1][r] * c[kPieces - 1][r]);
  }

  // Both rows at a time: scaling sums in fp16 takes no longer than finding out whether that is needed.
  __device__ __forceinline__ void advance_maxima(const Factors& top, const Factors& c) {
    float x[2], alpha[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = quad_max(largest_of(top, c, r));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float next = x[r] + b[r] <= kLimit<true> ? b[r] : kHalfAtMaximum - x[r];
      alpha[r] = exp2_approx(next - b[r]);
      b[r] = next;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) scale_sums<true>(r, alpha[r]);
  }

  // x: the thread's largest score of a row, scaled.
  template <bool kHalf>
  __device__ __forceinline__ void advance_maximum(int r, float x) {
    constexpr float at_maximum = kHalf ? kHalfAtMaximum : kAtMaximum;
    if (__all_sync(~0u, x + b[r] <= kLimit<kHalf>)) return;
    const float top = quad_max(x);
    float next = b[r];
    if (!(top + b[r] <= kLimit<kHalf>)) {
      next = kBounded ? bounded_offset(top, bound_of_row(r), at_maximum, kLimit<kHalf>) : at_maximum - top;
    }
    const float alpha = exp2_approx(next - b[r]);
    const bool first = __all_sync(~0u, b[r] == -kLowest);  // O is zero
    b[r] = next;
    if (!first) scale_sums<kHalf>(r, alpha);
  }

  template <bool kHalf>
  __device__ __forceinline__ void scale_sums(int r, float alpha) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[kSums * r + i] *= alpha;
    if constexpr (kHalf) {
      l[r] *= half.scale(r, alpha);
    } else {
      l[r] *= alpha;
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) o[i / 2 * 4 + 2 * r + i % 2] *= alpha;
    }
  }

  // Scales rows with a large sum of P down, by a power of two, and what they add from now on.
  __device__ __forceinline__ void bound_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool beyond = l[r] > kLargestSum;
      if (!__any_sync(~0u, beyond)) continue;
      const int steps = beyond ? (__float_as_int(l[r]) >> 23) - 127 - kSumExponent : 0;
      b[r] -= static_cast<float>(steps);
      scale_sums<true>(r, __int_as_float((127 - steps) << 23));
    }
  }

  // The same for a step with masks.
  template <bool kHalf>
  __device__ __forceinline__ void reduce_masked(Factors& c, const float (&k_scale)[kPieces], int step) {
    uint32_t bad = kSide == 0 ? bad_keys(step) : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool undefined;
      float largest = kLowest;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if constexpr (kSide != 0) bad = bad_keys(step, piece);  // anew: registers are short
        const int top = mask_row(scores, r, step, bad, undefined, piece);
        c[piece][r] = scale_of_row<kHalf>(r) * k_scale[piece];
        if (kSide != 0 && first_key(step, piece) >= p.seqlen_k) c[piece][r] = 1.f;  // there may be no scale
        const float x = top == kMasked ? kLowest : static_cast<float>(top) * c[piece][r];
        largest = kSide == 0 ? x : fmaxf(largest, x);
        if (kSide != 0 && undefined) c[piece][r] = nan();
      }
      advance_maximum<kHalf>(r, largest);
      // The exponent of a masked score must vanish beside b: with a tiny scale the scores move to a coarser one, whose
      // step is far below fp32's resolution of b.
      float c_min = fmaf(fmaxf(b[r], 0.f), 0x1p-30f, 0x1p-22f);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (c[piece][r] < c_min) {
          coarsen_row(scores, r, c[piece][r] / c_min, piece);
          c[piece][r] = c_min;
        }
        pin(scores);
      }
      if (kSide == 0 && undefined) c[0][r] = nan();
    }
  }

  // Exponentials of some of the scores, and their sums: first those that MUFU is to work off, then those of pairs.
  template <int first, int last>
  __device__ __forceinline__ void exponentiate(const Factors& c) {
    constexpr int kPiece = kBlock / 2;  // registers of the first piece
    Factors pair_c;
    float pair_b[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) pair_c[piece][r] = c[piece][r] * (1.f / kHalfRange);
      pair_b[r] = fmaf(b[r], 1.f / kHalfRange, kHalfBias / kHalfRange);
    }
#pragma unroll
    for (int n = first; n < last; ++n) {
      if (is_polynomial(n / 2)) continue;
      const int r = n / 2 % 2;
      const float e = exp2_approx(fmaf(static_cast<float>(scores[n]), c[n / kPiece][r], b[r]));
      if constexpr (kExactSums) sum[kSums * r + n % kSums] += e;
      scores[n] = __float_as_int(e);
    }
#pragma unroll
    for (int i = first; i < last; i += 2) {
      if (!is_polynomial(i / 2)) continue;
      const int r = i / 2 % 2;
      const uint32_t e = exp2_pair(scores[i], scores[i + 1], pair_c[i / kPiece][r], pair_b[r]);
      if constexpr (kExactSums) {
        pair_sum[r] = is_first_polynomial(i / 2) ? e : half2_add(pair_sum[r], e);
      }
      scores[i] = static_cast<int32_t>(e);
    }
    if constexpr (kExactSums && kPolynomialPairs != 0 && last == kStep / 2) {
      sum[0] += half2_sum(pair_sum[0]);
      sum[kSums] += half2_sum(pair_sum[1]);
    }
  }

  // The scores' fragment is the A operand of P V: of 16-bit V as it is, of V8 when its keys stand in pair order.
  template <int first, int last>
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int j = first / 16; j < last / 16; ++j) {
      auto e = [&](int i) { return __int_as_float(scores[8 * j + i]); };
      if constexpr (kV == V::kIo) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = to_io2(e(2 * i), e(2 * i + 1));
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[4 * j + i] = static_cast<int32_t>(words[i]);
      } else {
        auto pair = [&](int i) {
          return is_polynomial(4 * j + i / 2) ? half2_to_e4m3x2(scores[8 * j + i]) : to_e4m3x2(e(i), e(i + 1));
        };
        const uint32_t upper = pack_halves(pair(0), pair(4)), lower = pack_halves(pair(2), pair(6));
        scores[2 * j] = static_cast<int32_t>(upper);
        scores[2 * j + 1] = static_cast<int32_t>(lower);
      }
    }
  }

  // Keeps what is not finite in the next block of V from queries that do not see it.
  __device__ __forceinline__ void hide_nonfinite(int block) {
    const int group = threadIdx.x / 128;
    // What another warpgroup has zeroed is noted before: wgmma is to see that, too, by the fence in clear_nonfinite().
    const bool mine = holds_nonfinite(s, ring.stage);
    if (!named_barrier_or(group, 128, mine || is_noted())) return;
    note() = turn;
    clear_nonfinite(s, ring.stage, first_nonfinite(), block * kBlock);
    named_barrier(group, 128);
  }

  // P of the keys from part `part` on, and its product with V.
  template <bool kHalf, int part>
  __device__ __forceinline__ void weigh(const Factors& c, int step) {
    constexpr int first = part * kStep / kParts, last = (part + 1) * kStep / kParts;
    exponentiate<first / 2, last / 2>(c);
    pack<first, last>();
    if constexpr (part == 0 && kWall<kHalf>) wait_for_block();  // it has come: this is no more than a branch
    pin_first<kWeights*(part + 1) / kParts>(scores);
    if constexpr (part == 0) pin_sums<kHalf>();
    issue_pv<kHalf, first, last>(step);
    if constexpr (part + 1 < kParts) weigh<kHalf, part + 1>(c, step);
  }

  template <bool kHalf>
  __device__ __forceinline__ void pin_sums() {
    if constexpr (kHalf) {
      pin(half.sums);
    } else {
      pin(o);
    }
  }

  // A block's sums of P stand behind its O. They are positive: in the tensor core's accumulator, which drops low bits,
  // the sum over many blocks would fall short.
  template <bool kHalf>
  __device__ __forceinline__ void take_sums() {
    if constexpr (kHalf) {
#pragma unroll
      for (int r = 0; r < 2; ++r) l[r] += half.take_sum(r);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) l[r] += o[kHeadDim / 2 + 2 * r];
#pragma unroll
      for (int r = 0; r < 2; ++r) o[kHeadDim / 2 + 2 * r] = 0.f;
    }
  }

  // The steps from `step` down to `stop`, one of `stride`, of which the first `masked` need masks; below 0: none to
  // come needs maxima.
  template <bool kHalf>
  __device__ __forceinline__ void attend_run(int& step, int stop, int stride, int& masked) {
    const uint32_t head_scales = kSide == 0 ? 0 : head_k_scales();
#pragma unroll 1
    for (; step >= stop; step -= stride) {
      float k_scale[kPieces];
      if constexpr (kSide != 0) {
        k_scales_at(head_scales, step, k_scale);
      } else {
        k_scale[0] = kFewRegisters<kHalf> ? k_scale_at(step) : next_k_scale();
      }
      issue_qk(scores);
      if (kFindsNonfinite && masked > 0) hide_nonfinite(step);
      wgmma_wait<0>();
      pin(scores);
      Factors c;
      if (masked > 0) {
        --masked;
        reduce_masked<kHalf>(c, k_scale, step);
        if (kBounded && masked == 0 && bounded()) masked = -1;
      } else if (kBounded && masked < 0) {
        set_scales<kHalf>(c, k_scale);
      } else if (reduce<kHalf>(c, k_scale) && bounded()) {
        masked = -1;
      }
      weigh<kHalf, 0>(c, step);
      wgmma_wait<0>();
      pin_sums<kHalf>();
      pin_first<kWeights>(scores);
      if constexpr (kOnes != 0) take_sums<kHalf>();
      release_block();
      if (stride > 1) skip_blocks(min(stride - 1, step - static_cast<int>(uniform(task().begin))));
    }
  }

  // All steps this warpgroup sees, from the last one down. The first one may hold the causal diagonal or the end of
  // the keys; with keys that are not finite every step is masked.
  template <bool kHalf>
  __device__ __forceinline__ void attend_blocks(int stride) {
    int masked = uniform(task().masked);
    const int begin = uniform(task().begin);
    int step = static_cast<int>(uniform(task().end)) - 1;
    if constexpr (!kHalf) {
      attend_run<kHalf>(step, begin, stride, masked);
      return;
    }
    half.clear();
    // Sums are looked at behind 4, 16, 32, 64, 96, ... steps, or 3, 12, 24, 48, ...; the first P cannot be too large.
    constexpr int kFirstLook = kSettleSteps / 8;
    static_assert(kFirstLook * kStep * 112 < 65504);
    int seen = 0, next = kFirstLook;
#pragma unroll 1
    while (step >= begin) {
      const int stop = max(begin, step + stride * (1 + seen - next));
      attend_run<kHalf>(step, static_cast<int>(uniform(stop)), stride, masked);
      if (step < begin) break;
      seen = next;
      next = seen < kSettleSteps ? min(4 * seen, seen + kSettleSteps / 2) : seen + kSettleSteps;
      bound_sums();
      if (seen % kSettleSteps == 0) half.settle(s, seen == kSettleSteps);
    }
    if (__any_sync(~0u, half.has_overflown())) tell_overflow(s, task().place());
    half.read(o, s, seen >= kSettleSteps);
  }

  // To L1: the epilogue's scales and means of V, in lines of 32 channels.
  __device__ __forceinline__ void prefetch_channels() const {
    constexpr int kLines = kHeadDim / 32;
    const int lane = thread_index() % 32;
    const int64_t channel = static_cast<int64_t>(task().head_kv) * kHeadDim + lane % kLines * 32;
    if (lane < 2 * kLines) prefetch_l1((lane < kLines ? p.v_scale : p.v_mean) + channel);
  }

  __device__ __forceinline__ void attend() {
    if constexpr (kV == V::kFp8) prefetch_channels();
    for (int r = 0; r < 2; ++r) q_scale[r] = s.q_scale[row() + 8 * r];
    b[0] = b[1] = -kLowest;
    for (float& x : sum) x = 0.f;
    const int stride = kJoins ? uniform(task().stride) : 1;
    skip_blocks(uniform(task().skipped));
    if (stride > 1) {
      attend_blocks<kHalfSums>(kGroups);
    } else if (kHalfSums && uniform(task().in_half()) != 0) {
      attend_blocks<true>(1);
    } else {
      attend_blocks<false>(1);
    }
    if (kHalfSums && has_settled_sums(uniform(task().skipped + task().end - task().begin))) free_sums();
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = kExactSums ? row_sum(kSums == 1 ? sum[r] : sum[2 * r] + sum[2 * r + 1]) : l[r];
      if constexpr (kOnes == 0) l[r] = total[r];
    }
    if (stride > 1 && !join(s, o, b, l, total)) return;
    write({-b[0], -b[1]}, total);
  }

  // Next queries may take the room of the settled sums.
  __device__ __forceinline__ void free_sums() {
    __syncwarp();
    mbarrier_arrive_once(shared_address(&s.empty_sums[thread_index() / 128 - 1]));
  }
};

}  // namespace sagert
