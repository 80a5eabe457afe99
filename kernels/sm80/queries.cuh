// SPDX-License-Identifier: Apache-2.0
// Queries: each warp quantizes its own rows to the A fragments of Q K^T, one scale per row.
#pragma once

#include "rows.cuh"
#include "tile.cuh"

namespace sagert {

using QueryFragments = uint32_t[kM][kQueryParts][4];

// Copies 16 queries from `row` on, of any strides and any number of channels, to this warp's room in shared memory,
// padded with zeros.
__device__ __forceinline__ void stage_queries(const Params& p, const uint16_t* queries, int row, int end,
                                              uint16_t* staged) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < 16 * kChannels; i += 32) {
    const int r = row + i / kChannels, d = i % kChannels;
    staged[i] = r < end && d < p.head_dim ? queries[r * p.q_ss + d * p.q_sd] : uint16_t{0};
  }
  __syncwarp();
}

// Low nibble: an INT4 code; with `nonzero` 1 or -1 of the value's sign where it would be 0 though the value is not.
__device__ __forceinline__ uint32_t to_int4(float x, float inverse, bool nonzero) {
  const uint32_t code = to_int8(x, inverse);
  if (!nonzero || (code & 15) != 0 || x == 0.f) return code;
  return (__float_as_int(x) ^ __float_as_int(inverse)) < 0 ? 15u : 1u;
}

// Row r of the tile in INT4, less the mean of its block; else as quantize_row().
__device__ __forceinline__ float quantize_row_int4(const Params& p, const Tile& tile, const uint16_t* row, bool inside,
                                                   int quad, int r, QueryFragments& q, int m, int h,
                                                   const float* shift) {
  constexpr int kVectors = kQueryParts * 2;  // of 8 channels, that a lane has of a row
  const int64_t block = static_cast<int64_t>(tile.head) * p.q_blocks + tile.row / p.q_block_rows;
  const uint16_t* mean = p.q_mean + block * kHeadDim;
  // A value against an infinity in K is to keep its sign.
  const bool k_bad = __ldg(p.head_flags + tile.head / p.group * 2) != 0;
  float x[kVectors][8], amax = 0.f, product = 0.f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int channel = 32 * i + 8 * quad;
    uint4 raw = make_uint4(0, 0, 0, 0), means = make_uint4(0, 0, 0, 0);
    if (inside && channel < kChannels) {
      raw = *reinterpret_cast<const uint4*>(row + channel);
      means = __ldg(reinterpret_cast<const uint4*>(mean + channel));
    }
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w}, of_mean[4] = {means.x, means.y, means.z, means.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float value = j % 2 ? high_io(words[j / 2]) : low_io(words[j / 2]);
      x[i][j] = value - (j % 2 ? high_io(of_mean[j / 2]) : low_io(of_mean[j / 2]));
      amax = fmaxf(amax, fabsf(x[i][j]));
      finite = finite && fabsf(value) < infinity();
      if (shift != nullptr) product = fmaf(value, channel < kChannels ? __ldg(shift + channel + j) : 0.f, product);
    }
  }
  finite = __shfl_xor_sync(~0u, finite, 1) && finite;
  finite = __shfl_xor_sync(~0u, finite, 2) && finite;
  amax = quad_max(amax);
  const float inverse = copysignf(finite && amax >= kTiny ? kCodeMax / amax : 0.f, p.scale_log2);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    uint32_t codes[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) codes[j] = to_int4(x[i][j], inverse, k_bad);
    q[m][i / 2][i % 2 * 2 + h] = pack_nibbles(codes);
  }
  product = row_sum(product);
  if (shift != nullptr && quad == 0 && inside) {
    p.lse[static_cast<int64_t>(tile.head) * p.seqlen_q + tile.row + r] = product * p.scale_log2;
  }
  return finite ? amax * (1.f / kCodeMax) * fabsf(p.scale_log2) : nan();
}

// Row r of the tile, as half h of fragment m. Returns its scale. The LSE needs the queries' product with K's shift,
// which the scores lack: it waits where the LSE will stand.
__device__ __forceinline__ float quantize_row(const Params& p, const Tile& tile, const uint16_t* row, bool inside,
                                              int quad, int r, QueryFragments& q, int m, int h, const float* shift) {
  constexpr uint32_t kMagnitude = 0x7fff7fff;  // of two 16-bit floats: they compare as integers
  constexpr int kVectors = kChannels / 16;     // of 4 channels, that a lane has of a row
  uint2 x[kVectors];
  uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    x[i] = inside ? *reinterpret_cast<const uint2*>(row + 16 * i + 4 * quad) : make_uint2(0, 0);
    pair = __vmaxu2(__vmaxu2(pair, x[i].x & kMagnitude), x[i].y & kMagnitude);
  }
  const RowScale scale = row_scale(row_max(max(pair & 0xffff, pair >> 16)), p.scale_log2);
  float product = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    q[m][i / 2][i % 2 * 2 + h] = quantize4(x[i].x, x[i].y, scale.inverse);
    if (shift != nullptr) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(shift + 16 * i + 4 * quad));
      product = fmaf(low_io(x[i].x), four.x, fmaf(high_io(x[i].x), four.y, product));
      product = fmaf(low_io(x[i].y), four.z, fmaf(high_io(x[i].y), four.w, product));
    }
  }
  product = row_sum(product);
  if (shift != nullptr && quad == 0 && inside) {
    p.lse[static_cast<int64_t>(tile.head) * p.seqlen_q + tile.row + r] = product * p.scale_log2;
  }
  return scale.scale;
}

// Fragment m of this warp's, whose first row is `row` of the tile; lane t's first one stands at `queries`.
__device__ __forceinline__ void quantize_queries(const Params& p, const Tile& tile, const uint16_t* queries,
                                                 int64_t stride, int row, int m, QueryFragments& q,
                                                 float (&scale)[2 * kM]) {
  const float* shift = p.write_lse ? p.k_shift + static_cast<int64_t>(tile.head / p.group) * kHeadDim : nullptr;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + threadIdx.x % 32 / 4 + 8 * h;
    const bool inside = tile.row + r < p.seqlen_q;
    const uint16_t* place = queries + 8 * h * stride;
    if constexpr (kInt4) {
      scale[2 * m + h] = quantize_row_int4(p, tile, place, inside, threadIdx.x % 4, r, q, m, h, shift);
    } else {
      scale[2 * m + h] = quantize_row(p, tile, place, inside, threadIdx.x % 4, r, q, m, h, shift);
    }
  }
}

}  // namespace sagert
