// SPDX-License-Identifier: Apache-2.0
// Infinities and NaN of 16-bit V under a causal mask. Nobody looks for them beforehand, which would take a reading of
// all of V: a consumer looks through the blocks that it masks. Where it finds some, it notes where they stand and
// zeroes them in shared memory, so that they reach no query that does not see them; the epilogue gives them to those
// that do. Blocks that a warpgroup sees as a whole it takes as they come: what another one has zeroed there is noted.
#pragma once

#include "ptx/half2.cuh"
#include "ptx/load.cuh"
#include "ptx/named_barrier.cuh"
#include "tile.cuh"

namespace sagert {

// a * b + c of pairs of the 16-bit type.
__device__ __forceinline__ uint32_t io2_fma(uint32_t a, uint32_t b, uint32_t c) {
#if SAGERT_IO_BF16
  return bfloat2_fma(a, b, c);
#else
  return half2_fma(a, b, c);
#endif
}

// In stage `stage`. The threads of a warpgroup share the tile.
__device__ __forceinline__ bool holds_nonfinite(const Shared& s, uint32_t stage) {
  const uint4* tile = reinterpret_cast<const uint4*>(s.v[stage]);
  uint32_t zeros[2] = {0, 0};  // NaN where 0 times an element is
  auto add = [&](uint32_t& sum, uint32_t pair) { sum = io2_fma(pair, 0, sum); };
#pragma unroll 4
  for (int i = threadIdx.x % 128; i < kVTileBytes / 16; i += 128) {
    const uint4 x = tile[i];
    add(zeros[0], x.x), add(zeros[1], x.y), add(zeros[0], x.z), add(zeros[1], x.w);
  }
  return ((zeros[0] | zeros[1]) & 0x7fff7fffu) != 0;
}

// Key `key` of a head is the first found, so far, whose channel is +inf or NaN (first[channel]) or -inf or NaN
// (first[kHeadDim + channel]), if no earlier one is. `bits`: the element's.
__device__ __forceinline__ void note_nonfinite(int* first, int channel, int key, uint32_t bits) {
  const bool is_nan = (bits & 0x7fff) != SAGERT_IO_INFINITY, is_negative = (bits & 0x8000) != 0;
  auto note = [&](int* place) {
    if (load_current(place) > key) atomicMin(place, key);
  };
  if (is_nan || !is_negative) note(first + channel);
  if (is_nan || is_negative) note(first + kHeadDim + channel);
}

// Zeroes them in stage `stage`, which holds the keys from `first_key` on. `first`: of the head.
__device__ __forceinline__ void clear_nonfinite(Shared& s, uint32_t stage, int* first, int first_key) {
  constexpr int kChunks = kMapWidth / 8;  // of 16 bytes, in a row of one copy of the tensor map
  uint16_t* tile = reinterpret_cast<uint16_t*>(s.v[stage]);
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < kVTileBytes / 2; i += 128) {
    const uint32_t bits = tile[i];
    if ((bits & SAGERT_IO_INFINITY) != SAGERT_IO_INFINITY) continue;
    const int row = i / kMapWidth, key = row % kBlock;
    const int channel = row / kBlock * kMapWidth + (i / 8 % kChunks ^ key % 8) * 8 + i % 8;
    note_nonfinite(first, channel, first_key + key, bits);
    __threadfence();  // who does not find it any more finds the note
    tile[i] = 0;
  }
  fence_async_shared();
}

}  // namespace sagert
