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

// Where a lane's vectors of a row are: neighbouring rows are read at different ones, which lie on different banks. Rows
// 8 apart have the same, and so has the tile that they are written to.
struct RowVectors {
  int odd, quad, place;

  __device__ __forceinline__ RowVectors(int row, int lane_of_row) : odd(row & 1), quad(lane_of_row) {
    place = swizzled<kHeadDim>(odd * 2 + quad / 2, row) * 16 + quad % 2 * 8;
  }
  __device__ __forceinline__ int vector(int i) const { return i / 2 * 8 + (i % 2 == 0 ? odd : 1 - odd) * 4 + quad; }
  __device__ __forceinline__ int place_of(int i) const { return place ^ 32 * i; }  // bytes from the row's beginning
};

// Rows `row` and `row` + 8, whose copies have come, both at a time: one row's steps wait for each other. `shift` is
// K's, or null.
__device__ __forceinline__ void quantize_rows(const Params& p, Shared& s, int row, int quad, const float* shift,
                                              QuantizedRow (&rows)[2]) {
  const RowVectors vectors(row, quad);
  uint4 x[2][kVectors];
  float inverse[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) x[n][i] = s.raw[(row + 8 * n) * (kHeadDim / 8) + vectors.vector(i)];
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    // 16-bit floats compare as integers do: as unsigned ones the largest is the largest negative one, if there is any,
    // as signed ones the largest positive one.
    uint32_t largest = 0, positive = 0x80008000;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 v = x[n][i];
      largest = __vmaxu2(__vmaxu2(__vmaxu2(__vmaxu2(largest, v.x), v.y), v.z), v.w);
      positive = __vmaxs2(__vmaxs2(__vmaxs2(__vmaxs2(positive, v.x), v.y), v.z), v.w);
    }
    const uint32_t pair = __vmaxu2(largest & 0x7fff7fff, positive & 0x7fff7fff);
    const RowScale scale = row_scale(row_max(max(pair & 0xffff, pair >> 16)), p.scale_log2);
    inverse[n] = scale.inverse;
    rows[n] = {scale.scale, 0.f, 0};
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 v = x[n][i];
      const uint2 packed = {quantize4(v.x, v.y, inverse[n]), quantize4(v.z, v.w, inverse[n])};
      *reinterpret_cast<uint2*>(s.q + (row + 8 * n) * kHeadDim + vectors.place_of(i)) = packed;
      if constexpr (kBounded) rows[n].squares = add_squares(packed.x, add_squares(packed.y, rows[n].squares));
    }
    if constexpr (kBounded) rows[n].squares = row_sum(rows[n].squares);
  }
  if (shift == nullptr) return;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float product = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {x[n][i].x, x[n][i].y, x[n][i].z, x[n][i].w};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 two = __ldg(reinterpret_cast<const float2*>(shift + vectors.vector(i) * 8 + 2 * m));
        product = fmaf(low_io(words[m]), two.x, fmaf(high_io(words[m]), two.y, product));
      }
    }
    rows[n].shift = row_sum(product) * p.scale_log2;
  }
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
