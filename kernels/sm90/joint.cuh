// SPDX-License-Identifier: Apache-2.0
// Joint tiles: where a tile has queries for one warpgroup only, all of them attend to these, each to its blocks of
// keys, and the first one joins what they have. A warpgroup alone takes two thirds of the time that three take with 64
// queries each.
#pragma once

#include "ptx/named_barrier.cuh"
#include "ptx/numeric.cuh"
#include "ptx/registers.cuh"
#include "tile.cuh"

namespace sagert {

// What a warpgroup hands over lies where its queries were, some vectors of 4 words of each thread at a time.
struct JointRoom {
  static constexpr int kVectors = kHeadDim / 32;
  static_assert(kVectors >= 2, "a thread's rows take two vectors");

  Shared& s;

  __device__ __forceinline__ float4& at(int group, int i) const {
    return reinterpret_cast<float4*>(s.q + group * 64 * kHeadDim)[128 * i + thread_index() % 128];
  }
  static __device__ __forceinline__ void barrier() { named_barrier(kGroups + 1, 128 * kGroups); }
};

// Brings the sums of all warpgroups to the first one's o, l and total, and to the least b: exponents are c * score + b.
// Says whether this is the first one.
template <int count>
__device__ __forceinline__ bool join(Shared& s, float (&o)[count], float (&b)[2], float (&l)[2], float (&total)[2]) {
  constexpr int kVectors = JointRoom::kVectors;
  const int group = static_cast<int>(thread_index() / 128) - 1;
  const JointRoom room{s};
  room.barrier();  // nobody reads the queries any more
  room.at(group, 0) = make_float4(b[0], b[1], l[0], l[1]);
  room.at(group, 1) = make_float4(total[0], total[1], 0.f, 0.f);
  room.barrier();
  float least[2] = {b[0], b[1]}, factor[2];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    least[0] = fminf(least[0], room.at(g, 0).x);
    least[1] = fminf(least[1], room.at(g, 0).y);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factor[r] = exp2_approx(least[r] - b[r]);
    b[r] = least[r];
    l[r] = total[r] = 0.f;
  }
  if (group == 0) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float4 rows = room.at(g, 0), totals = room.at(g, 1);
      const float first = exp2_approx(least[0] - rows.x), second = exp2_approx(least[1] - rows.y);
      l[0] = fmaf(rows.z, first, l[0]);
      l[1] = fmaf(rows.w, second, l[1]);
      total[0] = fmaf(totals.x, first, total[0]);
      total[1] = fmaf(totals.y, second, total[1]);
    }
  }
#pragma unroll
  for (int first = 0; first < kHeadDim / 2; first += 4 * kVectors) {
    room.barrier();  // what was handed over before has been read
    if (group != 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float* x = o + first + 4 * i;
        room.at(group, i) = make_float4(x[0] * factor[0], x[1] * factor[0], x[2] * factor[1], x[3] * factor[1]);
      }
    }
    room.barrier();
    if (group != 0) continue;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float* x = o + first + 4 * i;
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] *= factor[n / 2];
#pragma unroll
      for (int g = 1; g < kGroups; ++g) {
        const float4 other = room.at(g, i);
        x[0] += other.x, x[1] += other.y, x[2] += other.z, x[3] += other.w;
      }
    }
  }
  room.barrier();  // the others' next queries go where the first one has read
  return group == 0;
}

}  // namespace sagert
