// SPDX-License-Identifier: Apache-2.0
// Pre-pass of the mma family, first of two launches: column statistics of K and V.
//
// The keys of each head are in `parts` parts of part_rows; a block takes V of one part, or a share of the keys whose
// mean is subtracted of K. quantize_kv.cu combines the parts, in their order: the same input gives the same bits.
#include "integers.cuh"
#include "kv_statistics.cuh"
#include "ptx/numeric.cuh"

namespace sagert {

struct alignas(16) Shared {
  float partial[kWarps][kStatsMax][kHeadDim];
  float stats[kStatsMax][kHeadDim];
  int first[2][kHeadDim];
  int nonfinite;
  int64_t channel_stride;
};

// Writes what the block at `index` has found: of K sums, of V all statistics and where its non-finite entries are.
// Clears K's flag, which quantize_kv.cu sets where a head has such entries.
__device__ __forceinline__ void write_statistics(const Shared& s, int index, int parts, bool v_stats, float* k_sum,
                                                 float* v_out, int* part_bad, int* part_first, int* head_flags) {
  const int job = index / parts, part = index % parts;
  const bool is_v = v_stats && job % 2 == 1;
  const int64_t bh = v_stats ? job / 2 : job, at = bh * parts + part;
  float* out = is_v ? v_out + at * kStatsMax * kHeadDim : k_sum + at * kHeadDim;
  for (int i = threadIdx.x; i < (is_v ? kStatsMax : 1) * kHeadDim; i += kThreads) {
    out[i] = s.stats[i / kHeadDim][i % kHeadDim];
  }
  if (is_v && s.nonfinite != 0) {
    int* first = part_first + at * 2 * kHeadDim;
    for (int i = threadIdx.x; i < 2 * kHeadDim; i += kThreads) first[i] = s.first[i / kHeadDim][i % kHeadDim];
  }
  if (threadIdx.x == 0 && is_v) part_bad[at] = s.nonfinite;
  if (threadIdx.x == 0 && !is_v && part == 0) head_flags[2 * bh] = 0;
}

}  // namespace sagert

// Grid: parts * B * Hk blocks, twice as many with v_stats. KSum [B * Hk, parts, D], VStats [B * Hk, parts, 4, D];
// PartBad [B * Hk, parts]: whether the part of V has infinities or NaN; PartFirst [B * Hk, parts, 2, D], written where
// it has; HeadFlags [B * Hk, 2], of K and of V.
extern "C" __global__ void __launch_bounds__(sagert::kThreads, 2)
    kv_stats(const uint16_t* K, const uint16_t* V, float* KSum, float* VStats, int* PartBad, int* PartFirst,
             int* HeadFlags, int seqlen_k, int heads_kv, int parts, int part_rows, int head_dim, int head_dim_v,
             int v_stats, int64_t k_sb, int64_t k_sh, int64_t k_ss, int64_t k_sd, int64_t v_sb, int64_t v_sh,
             int64_t v_ss, int64_t v_sd, int k_vec, int v_vec) {
  using namespace sagert;
  __shared__ Shared s;
  int index = blockIdx.x;
  const int job = index / parts, part = index % parts;
  const bool is_v = v_stats != 0 && job % 2 == 1;
  const int64_t bh = v_stats != 0 ? job / 2 : job, b = bh / heads_kv, h = bh % heads_kv;
  if (threadIdx.x == 0) s.channel_stride = is_v ? v_sd : k_sd;
  __syncthreads();
  if (is_v) {
    const int first = part * part_rows, end = min(first + part_rows, seqlen_k);
    Input in{V + b * v_sb + h * v_sh, v_ss, &s.channel_stride, seqlen_k, head_dim_v, v_vec != 0};
    column_statistics<kStatsMax, 2>(s, in, first, end);
  } else {
    Input in{K + b * k_sb + h * k_sh, k_ss, &s.channel_stride, seqlen_k, head_dim, k_vec != 0};
    const Sample sample(seqlen_k);
    sample_sums(s, in, sample, sample.begin(part, parts), sample.begin(part + 1, parts));
  }
  __syncthreads();
  forget(index);  // worked out anew: kept, it would take registers from the loads
  write_statistics(s, index, parts, v_stats != 0, KSum, VStats, PartBad, PartFirst, HeadFlags);
}
