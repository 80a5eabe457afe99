// SPDX-License-Identifier: Apache-2.0
// Powers of 2 of a pair of scores on the FMA pipes, for those that the MUFU pipe has no time for.
#pragma once

#include "ptx/half2.cuh"
#include "ptx/numeric.cuh"

namespace sagert {

// Of a thread's 32 pairs in a block of keys, those computed here: a bit each. Pair 2 j + r has keys 8 j + 2 quad +
// {0, 1} and row r. With a quarter to a third of them neither pipe waits for the other.
constexpr uint32_t kPolynomialPairs = kV != V::kFp8 ? 0 : kHeadDim == 64 ? 0x48a448a4u : 0x48484848u;
constexpr bool is_polynomial(int pair) { return kPolynomialPairs >> pair & 1; }
// Is it the first of its row?
constexpr bool is_first_polynomial(int pair) {
  const uint32_t row = pair % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  return (kPolynomialPairs & row & ((1u << pair) - 1)) == 0;
}

// Exponents are scaled to 1 = 2^5 for the clamp of a multiply-add, and biased as an fp16 is.
constexpr float kHalfRange = 32.f, kHalfBias = 15.f;
constexpr float kHalfUnit = 1.5f * 8192.f;  // its last bit is 2^-10: fp16's mantissa

// 2^(c * a + b), 2^(c * b + b) in fp16, b and c divided by kHalfRange and b biased: the exponent's bits with 10 bits
// behind the point are those of the fp16 number (1 + f) 2^n; a quadratic in 1 + f makes it 2^f 2^n (relative error
// .4 %, against 6 % of e4m3's rounding). Exponents must be below 16; those below -15 vanish.
__device__ __forceinline__ uint32_t exp2_pair(int first, int second, float c, float b) {
  auto fixed = [&](int score) {
    return __float_as_uint(fmaf(ptx::fma_saturated(static_cast<float>(score), c, b), kHalfRange, kHalfUnit));
  };
  const uint32_t x = __byte_perm(fixed(first), fixed(second), 0x5410);
  const uint32_t mantissa = (x & 0x03ff03ffu) | 0x3c003c00u;
  // .23389 m^2 - .69434 m + 1.45703, nearest to 2^(m - 1) / m on [1, 2] among fp16 coefficients.
  const uint32_t ratio = ptx::half2_fma(ptx::half2_fma(mantissa, 0x337c337cu, 0xb98eb98eu), mantissa, 0x3dd43dd4u);
  return ptx::half2_mul(x, ratio);
}

}  // namespace sagert
