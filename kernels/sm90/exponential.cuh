// SPDX-License-Identifier: Apache-2.0
// Powers of 2 of a pair of scores on the FMA pipes, which relieve the MUFU pipe.
#pragma once

#include "ptx/half2.cuh"
#include "ptx/numeric.cuh"

namespace sagert {

// Of a thread's 32 pairs in a block of keys, or 48 of a step of a block and a half, those computed here: a bit each.
// Pair 2 j + r has keys 8 j + 2 quad + {0, 1} and row r. Number and places are what was fastest of those measured.
constexpr uint64_t kPolynomialPairs = kV != V::kFp8    ? 0
                                      : kSide != 0     ? 0x48103004u
                                      : kHeadDim == 64 ? 0x30043004u
                                                       : 0x48404840u;
constexpr bool is_polynomial(int pair) { return kPolynomialPairs >> pair & 1; }
// Is it the first of its row?
constexpr bool is_first_polynomial(int pair) {
  const uint64_t row = 0x5555555555555555u << pair % 2;
  return (kPolynomialPairs & row & ((uint64_t{1} << pair) - 1)) == 0;
}

// Exponents are scaled to 1 = 2^5 for the clamp of a multiply-add, and biased as an fp16 is.
constexpr float kHalfRange = 32.f, kHalfBias = 15.f;
constexpr float kHalfUnit = 1.5f * 8192.f;  // its last bit is 2^-10: fp16's mantissa

// 2^(c * score + b) of two scores in fp16, b and c divided by kHalfRange and b biased. The exponent's bits with 10 bits
// f behind the point are those of the fp16 number m 2^n, m = 1 + f; taking m's bits off and adding those of a cubic
// near 2^(m - 1) makes it 2^f 2^n. The cubic is 1 at m = 1, so that nothing is left of exponents below -15. Relative
// error .1 % at most, .03 % on average, against 3 % of e4m3's rounding. Exponents must be below 16.
__device__ __forceinline__ uint32_t exp2_pair(int first, int second, float c, float b) {
  auto fixed = [&](int score) {
    return __float_as_uint(fmaf(ptx::fma_saturated(static_cast<float>(score), c, b), kHalfRange, kHalfUnit));
  };
  const uint32_t x = __byte_perm(fixed(first), fixed(second), 0x5410);
  const uint32_t m = (x & 0x03ff03ffu) | 0x3c003c00u;
  // ((.077881 m - .0080338) m + .47876) m + .45117: nearest among fp16 coefficients.
  uint32_t power = ptx::half2_fma(m, 0x2cfc2cfcu, 0xa01da01du);
  power = ptx::half2_fma(power, m, 0x37a937a9u);
  power = ptx::half2_fma(power, m, 0x37383738u);
  return x + power - m;  // each half of the sum is an fp16 number: nothing carries
}

}  // namespace sagert
