// SPDX-License-Identifier: Apache-2.0
// Attention of the mma.sync family: INT8 or INT4 Q K^T, online softmax in base 2 (FlashAttention-2, arXiv 2307.08691),
// and P V of V in 16 bits, as the caller has it, with P in the same type, or of scaled V with P in fp16 and sums in
// fp16; of V in INT8 in integers; of V in FP8 with P in e4m3 and the factor 448 in its exponent (SageAttention2, arXiv
// 2411.10958).
//
// A thread block has one tile of queries. A warp holds its queries, quantized, and its rows of O in registers; keys and
// values come through a ring of stages in shared memory. docs/performance/mma.md has the budget and the measurements.
#if V_I8
#include "fold.cuh"
#elif V_FP8E4NV
#include "fp8.cuh"
#elif V_FP16S
#include "half.cuh"
#else
#include "direct.cuh"
#endif

static_assert(sagert::kSharedBytes <= SHARED_BYTES, "the manifest gives the block too little shared memory");

extern "C" __global__ void __launch_bounds__(sagert::kThreads, MIN_BLOCKS)
    attention(const uint16_t* Q, const int8_t* K8, const float* KScale, const int* KBad, const float* KShift,
              const float* KNorm, const int8_t* V, const sagert::VScaleType* VScale, const float* VMean,
              const int* VFirst, const int* HeadFlags, uint16_t* Out, float* Lse, float scale_log2, int seqlen_q,
              int seqlen_k, int blocks, int heads_q, int group, int head_dim, int head_dim_v, int tiles,
              int heads_total, int section, int64_t v_sb, int64_t v_sh, int64_t v_ss, int64_t q_sb, int64_t q_sh,
              int64_t q_ss, int64_t q_sd, int64_t o_sb, int64_t o_sh, int64_t o_ss, int64_t o_sd, int q_vec, int o_vec,
              int write_lse, const uint16_t* QMean, const float* Bias, int q_blocks, int q_block_rows) {
  using namespace sagert;
  extern __shared__ __align__(1024) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const Params p = {Q,          K8,          KScale,         KBad,      KShift, KNorm,    V,
                    VScale,     VMean,       VFirst,         HeadFlags, Out,    Lse,      scale_log2,
                    seqlen_q,   seqlen_k,    blocks,         heads_q,   group,  head_dim, head_dim_v,
                    tiles,      heads_total, section,        v_sb,      v_sh,   v_ss,     q_sb,
                    q_sh,       q_ss,        q_sd,           o_sb,      o_sh,   o_ss,     o_sd,
                    q_vec != 0, o_vec != 0,  write_lse != 0, QMean,     Bias,   q_blocks, q_block_rows};
#if V_I8
  FoldWarp warp(p, s);
#elif V_FP8E4NV
  Fp8Warp warp(p, s);
#elif V_FP16S
  HalfWarp warp(p, s);
#else
  DirectWarp warp(p, s);
#endif
  warp.attend();
}
