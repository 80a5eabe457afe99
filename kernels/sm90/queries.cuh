// SPDX-License-Identifier: Apache-2.0
// Queries: each warp of a consumer quantizes its own 16 rows, one scale per row, when it comes to a tile; what it reads
// the scout had copied to shared memory. Four lanes share a row.
#pragma once

#include "rows.cuh"
#include "tile.cuh"

namespace sagert {

constexpr int kVectors = kHeadDim / 32;  // of 8 channels, that a lane has of a row

// Queries of a head, from `row` on.
__device__ __forceinline__ const uint16_t* queries_of(const Params& p, int head, int row) {
  return p.q + head / p.heads_q * p.q_sb + head % p.heads_q * p.q_sh + row * p.q_ss;
}

// What is kept of a quantized row: its scale, the sum of its codes' squares where scores are bounded, and, for the LSE,
// its product with the shift of K, which the scores lack.
struct QuantizedRow {
  float scale, shift;
  int squares;
};

// A row whose copy has come. `shift` is K's, or null.
__device__ __forceinline__ QuantizedRow quantize_row(const Params& p, Shared& s, int r, int quad, const float* shift) {
  constexpr uint32_t kMagnitude = 0x7fff7fff;  // of two 16-bit floats: they compare as integers
  // Neighbouring rows are read at different vectors, which lie on different banks.
  auto vector = [&](int i) { return (i ^ r & 1) * 4 + quad; };
  uint4 x[kVectors];
  uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    x[i] = s.raw[r * (kHeadDim / 8) + vector(i)];
    pair = __vmaxu2(__vmaxu2(pair, x[i].x & kMagnitude), x[i].y & kMagnitude);
    pair = __vmaxu2(__vmaxu2(pair, x[i].z & kMagnitude), x[i].w & kMagnitude);
  }
  const RowScale scale = row_scale(row_max(max(pair & 0xffff, pair >> 16)), p.scale_log2);
  int squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    uint2 packed = {quantize4(x[i].x, x[i].y, scale.inverse), quantize4(x[i].z, x[i].w, scale.inverse)};
    const int place = swizzled<kHeadDim>(vector(i) / 2, r) * 16 + vector(i) % 2 * 8;
    *reinterpret_cast<uint2*>(s.q + r * kHeadDim + place) = packed;
    if constexpr (kBounded) squares = add_squares(packed.x, add_squares(packed.y, squares));
  }
  float product = 0.f;
  if (shift != nullptr) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 two = __ldg(reinterpret_cast<const float2*>(shift + vector(i) * 8 + 2 * n));
        product = fmaf(low_io(words[n]), two.x, fmaf(high_io(words[n]), two.y, product));
      }
    }
    product = row_sum(product);
  }
  if constexpr (kBounded) squares = row_sum(squares);
  return {scale.scale, product * p.scale_log2, squares};
}

// The same for any strides and any number of channels, from `row`.
__device__ __forceinline__ QuantizedRow quantize_row_any(const Params& p, Shared& s, int r, int quad,
                                                         const uint16_t* row, bool inside, const float* shift) {
  auto load = [&](int d) { return inside && d < p.head_dim ? row[d * p.q_sd] : uint16_t{0}; };
  uint32_t top = 0;
#pragma unroll 4
  for (int d = quad; d < kHeadDim; d += 4) top = max(top, load(d) & 0x7fffu);
  const RowScale scale = row_scale(row_max(top), p.scale_log2);
  float product = 0.f;
  int squares = 0;
#pragma unroll 4
  for (int d = quad; d < kHeadDim; d += 4) {
    const float x = low_io(load(d));
    const auto code = static_cast<int8_t>(to_int8(x, scale.inverse));
    s.q[r * kHeadDim + swizzled<kHeadDim>(d / 16, r) * 16 + d % 16] = code;
    if constexpr (kBounded) squares += code * code;
    if (shift != nullptr) product = fmaf(x, __ldg(shift + d), product);
  }
  if constexpr (kBounded) squares = row_sum(squares);
  return {scale.scale, row_sum(product) * p.scale_log2, squares};
}

}  // namespace sagert
