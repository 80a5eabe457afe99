// SPDX-License-Identifier: Apache-2.0
// Pre-passes, second reading of K and V: tiles of 128 keys, held by the 8 warps of a block, to INT8 and e4m3.
#pragma once

#include "bounds.cuh"
#include "kv_rows.cuh"
#include "values.cuh"

namespace sagert {

constexpr int kStepKeys = 128;  // keys

constexpr bool kInt8V = kV == V::kInt8, kQuantizedV = kV != V::kIo, kTiledV = kInt8V || kV == V::kFp8;

// A warp quantizes 16 keys of one scale group: keys 8 j + 2 group + parity, for 8 values of j. Load i of lane l is row
// i * kKRows + l / kChunks of these, row r being j = 8 * half + r / 2, parity r % 2; where a warp loads one row at a
// time, the rows of parity 0 come first.
constexpr int kKRows = 32 / kChunks;  // rows per load of a warp
constexpr int kKLoads = 16 / kKRows;
constexpr bool kKSingle = kKRows == 1;
constexpr int kKStep = kKSingle ? 8 : 4 * kKRows;  // keys from one load to the next, a multiple of the swizzle's period

// Load i: its first row of the warp's 16, and how many keys it is behind the thread's first.
__device__ __forceinline__ constexpr int k_load_row(int i) { return kKSingle ? 2 * (i % 8) + i / 8 : i * kKRows; }
__device__ __forceinline__ constexpr int k_load_key(int i) { return kKSingle ? i % 8 * kKStep + i / 8 : i * kKStep; }

struct KTile {
  uint32_t x[kKLoads][4];

  static __device__ __forceinline__ int first_row() {
    int warp = threadIdx.x / 32, r = threadIdx.x % 32 / kChunks;
    return 8 * (warp / kKGroups * 8 + r / 2) + 2 * (warp % kKGroups) + r % 2;
  }
  __device__ __forceinline__ void load(const Input& in, int row) {
    const int channel = 8 * (threadIdx.x % kChunks);
    if constexpr (kKSingle) {
      using Half = uint32_t[kKLoads / 2][4];
      load_rows(reinterpret_cast<Half&>(x[0]), in, row, kKStep, channel);
      load_rows(reinterpret_cast<Half&>(x[kKLoads / 2]), in, row + 1, kKStep, channel);
    } else {
      load_rows(x, in, row, kKStep, channel);
    }
  }
};

// Rows of a thread that are not quantized as they are: bit i for load i.
struct SpecialRows {
  uint32_t zero = 0, infinite = 0;
};

__device__ __forceinline__ float row_value(const uint32_t (&x)[4], int i) {
  return i % 2 ? high_io(x[i / 2]) : low_io(x[i / 2]);
}

// Extrema of a thread's rows.
__device__ __forceinline__ Extrema<4> extrema_of(const KTile& tile) {
  Extrema<4> extrema;
  extrema.clear();
#pragma unroll
  for (int i = 0; i < kKLoads; ++i) extrema.add(tile.x[i]);
  return extrema;
}

// Extrema of the ordinary rows; sorts out the others and marks the non-finite rows of the warp in `bad`.
__device__ __forceinline__ void find_special_rows(Extrema<4>& extrema, const KTile& tile, int rows_left,
                                                  SpecialRows& special, uint32_t& bad) {
  constexpr uint32_t kRowLanes = ~0u >> (32 - kChunks);
  int first_lane = threadIdx.x % 32 / kChunks * kChunks;
  extrema.clear();
#pragma unroll
  for (int i = 0; i < kKLoads; ++i) {
    bool has_inf = false, has_nan = false;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t magnitude = tile.x[i][j / 2] >> 16 * (j % 2) & 0x7fff;
      has_inf |= magnitude == kInfBits;
      has_nan |= magnitude > kInfBits;
    }
    uint32_t nan_lanes = __ballot_sync(0xffffffffu, has_nan);
    uint32_t bad_lanes = __ballot_sync(0xffffffffu, has_inf) | nan_lanes;
#pragma unroll
    for (int r = 0; r < kKRows; ++r) {
      if (bad_lanes >> r * kChunks & kRowLanes) bad |= 1u << (k_load_row(i) + r);
    }
    bool is_absent = k_load_key(i) >= rows_left;
    bool is_bad = (bad_lanes >> first_lane & kRowLanes) != 0;
    bool is_nan = (nan_lanes >> first_lane & kRowLanes) != 0;
    if (!is_absent && !is_bad) extrema.add(tile.x[i]);
    special.zero |= static_cast<uint32_t>(is_absent || is_nan) << i;
    special.infinite |= static_cast<uint32_t>(is_bad) << i;
  }
}

__device__ __forceinline__ uint32_t infinity_code(float value) {
  return fabsf(value) == infinity()
             ? (value > 0.0f ? static_cast<uint32_t>(kCodeMax) : -static_cast<uint32_t>(kCodeMax))
             : 0u;
}

// Bits of the largest |x - shift| of the warp's rows whose extrema these are.
__device__ __forceinline__ uint32_t warp_magnitude(const Extrema<4>& extrema, const float (&shift)[8]) {
  float amax = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) amax = max_nan(amax, extrema.amax(j, shift[j]));
  return __reduce_max_sync(0xffffffffu, __float_as_uint(amax) & 0x7fffffffu);
}

// Writes a thread's channels of its rows, from the first row's place on. Returns the largest sum of squares of these
// channels' codes in one row, if anything asks for it.
template <bool check>
__device__ __forceinline__ int write_k_rows(uint8_t* out, int offset, const KTile& tile, const float (&shift)[8],
                                            float inverse, SpecialRows special) {
  int largest = 0;
#pragma unroll
  for (int i = 0; i < kKLoads; ++i) {
    uint32_t q[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = to_int8(row_value(tile.x[i], j) - shift[j], inverse);
    if (check && special.infinite >> i & 1) {
#pragma unroll
      for (int j = 0; j < 8; ++j) q[j] = infinity_code(row_value(tile.x[i], j));
    }
    // An odd key's chunks of 16 bytes are swizzled the other way round.
    const int place = (kKSingle && i >= kKLoads / 2 ? (offset ^ 16) : offset) + k_load_key(i) * kKRowBytes;
    const bool zero = check && special.zero >> i & 1;
    if constexpr (kInt4) {
      *reinterpret_cast<uint32_t*>(out + place) = zero ? 0 : pack_nibbles(q);
    } else {
      uint2 packed = make_uint2(pack_low_bytes(q[0], q[1], q[2], q[3]), pack_low_bytes(q[4], q[5], q[6], q[7]));
      if (zero) packed = make_uint2(0, 0);
      *reinterpret_cast<uint2*>(out + place) = packed;
      if constexpr (kNormsOfK) largest = max(largest, add_squares(packed.x, add_squares(packed.y, 0)));
    }
  }
  return largest;
}

// A bound of the norms of the warp's keys, from the largest that each lane's channels have over them. Channels whose
// largest ones are of different keys make it up to 1.6 times the largest norm at N(0, 1); but no key needs an exchange.
__device__ __forceinline__ float norm_bound(float largest) {
#pragma unroll
  for (int i = kChunks; i < 32; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
  // In parts of the largest: squares of tiny norms would vanish, and those of huge ones overflow.
  const float unit = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
  float sum = unit == 0.0f ? 0.0f : (largest / unit) * (largest / unit);
#pragma unroll
  for (int i = 1; i < kChunks; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
  return unit * sqrtf(sum);
}

// Warp w holds the 16 keys from 16 w on, a thread kVChannels channels of each.
constexpr int kVWarps = kBlock / 16;  // that share a block
constexpr int kVChannels = kHeadDim / 32;
constexpr int kVWords = kVChannels / 2;

struct VTile {
  uint32_t x[16][kVWords];

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 * 16; }
  __device__ __forceinline__ void load(const Input& in, int row) {
    load_rows(x, in, row, 1, kVChannels * (threadIdx.x % 32));
  }
  // With `check`, 0 where there is no finite value.
  template <bool check>
  __device__ __forceinline__ float get(int key, int channel, const float (&shift)[kVChannels], int keys_left) const {
    float value = channel % 2 ? high_io(x[key][channel / 2]) : low_io(x[key][channel / 2]);
    if (check && (key >= keys_left || !is_finite(value))) return 0.0f;
    return value - shift[channel];
  }
};

template <bool check>
__device__ __forceinline__ void channel_amax(float (&amax)[kVChannels], const VTile& tile,
                                             const float (&shift)[kVChannels], int keys_left) {
  Extrema<kVWords> extrema;
  extrema.clear();
#pragma unroll
  for (int key = 0; key < 16; ++key) {
    if constexpr (check) {
      if (key < keys_left) extrema.add_finite(tile.x[key]);
    } else {
      extrema.add(tile.x[key]);
    }
  }
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) amax[e] = extrema.amax(e, shift[e]);
}

// bf16 not below x; x >= 0.
__device__ __forceinline__ uint32_t bf16_above(float x) { return (__float_as_uint(x) + 0xffffu) >> 16; }

// Scales, as bf16, of channels whose largest magnitudes in a block are `amax`; their inverses take the magnitudes'
// place.
__device__ __forceinline__ void scale_channels(float (&amax)[kVChannels], uint32_t (&bits)[kVChannels]) {
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) {
    bool zero = amax[e] < kTiny;
    bits[e] = bf16_above(zero ? 1.0f : amax[e] * (1.0f / 127.0f));
    amax[e] = zero ? 0.0f : 1.0f / __uint_as_float(bits[e] << 16);
  }
}

// Writes a block's scales: each 16 pairs of channels as 4 x 4, transposed, so that the four channel pairs of one lane
// of a fragment of P V stand together.
__device__ __forceinline__ void write_scales(const uint32_t (&bits)[kVChannels], int channel, VScaleType* scale) {
  int pair = channel / 2;  // a multiple of kVWords
  constexpr int kGroup = kHeadDim > 128 ? 112 : 48;
  uint32_t* place = reinterpret_cast<uint32_t*>(scale) + (pair & kGroup | pair << 2 & 12 | pair >> 2 & 3);
#pragma unroll
  for (int i = 0; i < kVWords; ++i) place[4 * i] = bits[2 * i] | bits[2 * i + 1] << 16;
}

// Writes the tiles of V8, kBlock bytes per channel, one after the other. Bits of `flip` are flipped in each word.
template <bool check, uint32_t flip = 0>
__device__ __forceinline__ void write_v_tile(uint8_t* out, const VTile& tile, const float (&shift)[kVChannels],
                                             const float (&inverse)[kVChannels], int keys_left) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 row[kVChannels];
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) {
    uint32_t word[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float x[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) x[p] = tile.get<check>(2 * m + p % 2 + p / 2 * 8, e, shift, keys_left);  // pair order
      if constexpr (kInt8V) {
        word[m] = pack_low_bytes(to_int8(x[0], inverse[e]), to_int8(x[1], inverse[e]), to_int8(x[2], inverse[e]),
                                 to_int8(x[3], inverse[e])) ^
                  flip;
      } else {
        word[m] = pack_halves(to_e4m3x2(x[0] * inverse[e], x[1] * inverse[e]),
                              to_e4m3x2(x[2] * inverse[e], x[3] * inverse[e]));
      }
    }
    row[e] = make_uint4(word[0], word[1], word[2], word[3]);
  }
  // Eight neighbouring lanes write at once: each picks its channels in an order that gives all eight a different
  // channel % 8, so that the swizzle sends them to different banks.
  int order = lane * kVChannels / 8 % kVChannels;
#pragma unroll
  for (int bit = 1; bit < kVChannels; bit *= 2) {
    bool swap = (order & bit) != 0;
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) {
      if (e & bit) continue;
      uint4 a = row[e], b = row[e | bit];
      row[e] = swap ? b : a;
      row[e | bit] = swap ? a : b;
    }
  }
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) {
    int channel = kVChannels * lane + (e ^ order);
    uint8_t* place = out + kBlock * channel;
    if constexpr (kBlock < kStepKeys) place += warp / kVWarps * kTileBytes;
    *reinterpret_cast<uint4*>(place + 16 * swizzled<kBlock>(kVWarps == kWarps ? warp : warp % kVWarps, channel)) =
        row[e];
  }
}

// Writes rows [row, end) of a head as convert(four words of a row, row) makes them; rows beyond the keys are zeros.
template <typename Convert>
__device__ __forceinline__ void write_rows(const Input& in, int row, int end, VOut* out, Convert convert) {
  constexpr int kLoads = 4;
  int channel = 8 * (threadIdx.x % kChunks);
#pragma unroll 1
  for (int r = row + threadIdx.x / kChunks; r < end; r += kLoads * kRowsPerPass) {
    uint32_t x[kLoads][4];
    load_rows(x, in, r, kRowsPerPass, channel);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      // A run is a multiple of kBlock rows.
      if (kBlock % (kLoads * kRowsPerPass) != 0 && r + i * kRowsPerPass >= end) break;
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(r + i * kRowsPerPass) * kHeadDim + channel) =
          convert(x[i], r + i * kRowsPerPass);
    }
  }
}

// Copies rows [row, end) of a head, padding them with zeros.
__device__ __forceinline__ void copy_rows(const Input& in, int row, int end, VOut* out) {
  write_rows(in, row, end, out, [](const uint32_t (&x)[4], int) { return make_uint4(x[0], x[1], x[2], x[3]); });
}

}  // namespace sagert
