// SPDX-License-Identifier: Apache-2.0
// Powers of 2 of a pair of scores on the FMA pipes, for those that the MUFU pipe has no time for.
#pragma once

#include "ptx/half2.cuh"
#include "ptx/numeric.cuh"

namespace sagert {

// Of a thread's 32 pairs in a block of keys, those computed here: a bit each. Pair 2 j + r has keys 8 j + 2 quad +
// {0, 1} and row r. At head_dim 64 MUFU has the most to do, and a third of them relieves it; at 128 it has not.
constexpr uint32_t kPolynomialPairs = kV == V::kFp8 && kHeadDim == 64 ? 0x49484948u : 0;
constexpr bool is_polynomial(int pair) { return kPolynomialPairs >> pair & 1; }
// Is it the first of its row?
constexpr bool is_first_polynomial(int pair) {
  const uint32_t row = pair % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  return (kPolynomialPairs & row & ((1u << pair) - 1)) == 0;
}

// Exponents are scaled to 1 = 2^5 for the clamp of a multiply-add, and biased as an fp16 is, less 1.
constexpr float kHalfRange = 32.f, kHalfBias = 14.f;
constexpr float kHalfUnit = 1.5f * 8192.f;  // its last bit is 2^-10: fp16's mantissa
constexpr uint32_t kHalves = 0x38003800;    // .5 in fp16, twice

// 2^(c * score + b) of two scores in fp16, b and c divided by kHalfRange and b biased. The exponent's bits with 10 bits
// f behind the point are those of the fp16 number m 2^n, m = (1 + f) / 2; taking m's bits off and adding those of a
// cubic near 2^f makes it 2^f 2^(n + 1). Relative error .12 % at most, .03 % on average, against 3 % of e4m3's
// rounding. Exponents must be below 17; those below -14 give 2^-14, which e4m3 rounds to 0. halves: kHalves.
__device__ __forceinline__ uint32_t exp2_pair(int first, int second, float c, float b, uint32_t halves) {
  auto fixed = [&](int score) {
    return __float_as_uint(fmaf(ptx::fma_saturated(static_cast<float>(score), c, b), kHalfRange, kHalfUnit));
  };
  const uint32_t x = __byte_perm(fixed(first), fixed(second), 0x5410);
  const uint32_t m = (x & 0x03ff03ffu) | halves;
  // ((m / 2 + .23877) m + .76367) m + .49634: fp16 coefficients that give 1 where f is 0.
  uint32_t power = ptx::half2_fma(m, halves, 0x33a433a4u);
  power = ptx::half2_fma(power, m, 0x3a1c3a1cu);
  power = ptx::half2_fma(power, m, 0x37f137f1u);
  return x + power - m;  // each half of the sum is an fp16 number: nothing carries
}

// Half of what exp2_pair gives, and 0 of the 2^-14 that stands for anything smaller: for sums.
__device__ __forceinline__ uint32_t half_without_least(uint32_t pair) { return pair - 0x04000400u; }

}  // namespace sagert
