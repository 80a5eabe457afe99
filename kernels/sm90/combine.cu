// SPDX-License-Identifier: Apache-2.0
// Joins what attention computed of split keys ("flash decoding"): a query's output is the mean of its parts' outputs,
// weighted by the parts' sums of P. Parts are added in their order: the same bits every time.
//
// PartOut [parts, B * H, S, HEAD_DIM]. PartLse [2 parts + 1, B * H, S], in units of log2: the parts' sums of P, their
// sums of exponentials, which P may be a rounding of, and what K's shift adds to all of them.
#include "ptx/pdl.cuh"
#include "rows.cuh"

namespace sagert {

constexpr int kLanes = HEAD_DIM / 4;  // per query, 4 channels each
constexpr int kQueries = 8;           // per thread block

// A part that holds an infinity was seen with a weight above 0, however small: the infinity stays what it is.
__device__ __forceinline__ float weighted(float weight, float x) { return fabsf(x) < infinity() ? weight * x : x; }

}  // namespace sagert

extern "C" __global__ void __launch_bounds__(sagert::kLanes* sagert::kQueries)
    combine(const float* PartOut, const float* PartLse, uint16_t* Out, float* Lse, int seqlen_q, int heads_q,
            int heads_total, int head_dim_v, int parts, int64_t o_sb, int64_t o_sh, int64_t o_ss, int64_t o_sd,
            int o_vec, int write_lse) {
  using namespace sagert;
  ptx::wait_for_prerequisites();
  const int rows = heads_total * seqlen_q;  // few: larger problems are not split
  const int row = blockIdx.x * kQueries + threadIdx.x / kLanes;
  if (row >= rows) return;
  const int lane = threadIdx.x % kLanes;
  auto part_lse = [&](int i) { return PartLse[int64_t{i} * rows + row]; };

  float top = kLowest;
#pragma unroll 4
  for (int i = 0; i < parts; ++i) top = fmaxf(top, part_lse(i));

  float sum = 0.f;
  float out[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int i = 0; i < parts; ++i) {
    const float4 x = reinterpret_cast<const float4*>(PartOut)[(int64_t{i} * rows + row) * kLanes + lane];
    const float part = part_lse(i);
    if (part == -infinity()) continue;  // saw no key, or none with a weight: its output is undefined
    const float weight = ptx::exp2_approx(part - top);
    sum += weight;
    out[0] += weighted(weight, x.x);
    out[1] += weighted(weight, x.y);
    out[2] += weighted(weight, x.z);
    out[3] += weighted(weight, x.w);
  }
  const float inverse = 1.f / sum;  // no key with a weight at all: 0 times infinity, NaN, as without parts
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] *= inverse;
  if (write_lse && lane == 0) {
    float total = 0.f;
    for (int i = parts; i < 2 * parts; ++i) total += ptx::exp2_approx(part_lse(i) - top);
    Lse[row] = kLn2 * (__log2f(total) + top + part_lse(2 * parts));
  }

  const int head = row / seqlen_q;
  uint16_t* place = Out + head / heads_q * o_sb + head % heads_q * o_sh + row % seqlen_q * o_ss;
  const int d = 4 * lane;
  if (o_vec) {
    uint2 packed = {to_io2(out[0], out[1]), to_io2(out[2], out[3])};
    *reinterpret_cast<uint2*>(place + d) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (d + i < head_dim_v) place[(d + i) * o_sd] = static_cast<uint16_t>(to_io2(out[i], 0.f));
    }
  }
}
