// SPDX-License-Identifier: Apache-2.0
// Attention of the sm90 wgmma family: INT8 Q K^T with wgmma, online softmax in base 2 (FlashAttention-2, arXiv
// 2307.08691). P V is with wgmma too: of V in FP8 with P in e4m3 and the factor 448 in its exponent (SageAttention2,
// arXiv 2411.10958); of V in 16 bits, as the caller has it, with P in the same type; of V in INT8 in integers.
//
// A block is one producer warpgroup and consumer warpgroups of 64 queries each; it stays for many tiles. Of the
// producer's warps one feeds keys and values (producer.cuh), the others go ahead of a consumer each and see to its next
// queries (scout.cuh). Three consumers take one block of keys after the other, and one computes while the others wait
// for the tensor core (consumer.cuh, consumer_int8.cuh); a tile with queries for only one of them they may share
// (joint.cuh). With few tiles combine.cu joins what attention made of parts of the keys. docs/performance/sm90.md has
// the budget and the measurements.
#if V8_I8
#include "consumer_int8.cuh"
#else
#include "consumer.cuh"
#endif
#include "producer.cuh"
#include "ptx/pdl.cuh"
#include "scout.cuh"

static_assert(sizeof(sagert::Shared) + 1023 <= SHARED_BYTES, "the manifest gives the block too little shared memory");

extern "C" __global__ void __launch_bounds__(sagert::kThreads, 1)
    attention(const uint16_t* Q, const int8_t* K8, const float* KScale, const int* KBad, const float* KShift,
              const float* KNorm,
#if VMAP_TENSORMAP
              const __grid_constant__ sagert::ptx::TensorMap VMap,
#else
              const int8_t* V8,
#endif
              const sagert::VScaleType* VScale, const float* VMean, int* VFirst, const int* HeadFlags, uint16_t* Out,
              float* Lse, float scale_log2, int seqlen_q, int seqlen_k, int blocks, int heads_q, int group,
              int head_dim, int head_dim_v, int tiles, int heads_total, int section, int64_t q_sb, int64_t q_sh,
              int64_t q_ss, int64_t q_sd, int64_t o_sb, int64_t o_sh, int64_t o_ss, int64_t o_sd, int q_vec, int o_vec,
              int write_lse, float* PartOut, float* PartLse, int* NextTile) {
  using namespace sagert;
  extern __shared__ __align__(1024) char raw[];
  // Swizzled tiles must stand on 1024 bytes, which the attribute does not promise for dynamic shared memory.
  Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
#if VMAP_TENSORMAP
  const int8_t* V8 = nullptr;
  const TensorMap* v_map = &VMap;
#else
  const TensorMap* v_map = nullptr;
#endif
  const Params p = {Q,        K8,         KScale,     KBad,           KShift,   KNorm,      V8,         v_map,
                    VScale,   VMean,      VFirst,     HeadFlags,      Out,      Lse,        scale_log2, seqlen_q,
                    seqlen_k, blocks,     heads_q,    group,          head_dim, head_dim_v, tiles,      heads_total,
                    section,  q_sb,       q_sh,       q_ss,           q_sd,     o_sb,       o_sh,       o_ss,
                    o_sd,     q_vec != 0, o_vec != 0, write_lse != 0, PartOut,  PartLse,    NextTile};
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * kGroups;
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared_address(&s.full[i]), 1);
      mbarrier_init(shared_address(&s.empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < kGroups; ++i) {
      mbarrier_init(shared_address(&s.full_q[i]), kScoutArrivals);
      mbarrier_init(shared_address(&s.empty_q[i]), 4);
      if constexpr (kHalfSums) mbarrier_init(shared_address(&s.empty_sums[i]), 4);
    }
    for (int i = 0; i < kTurns; ++i) {
      mbarrier_init(shared_address(&s.full_tile[i]), 1);
      mbarrier_init(shared_address(&s.empty_tile[i]), kGroups);
    }
    mbarrier_init_fence();
  }
  if (kFindsNonfinite && threadIdx.x < kNotes) s.notes[threadIdx.x] = -1;
  if (kHalfSums && threadIdx.x < 32) clear_overflown(s);
  if (kHalfSums && threadIdx.x < 128 * kGroups) s.turns[threadIdx.x] = 1;
  write_ones(s);
  __syncthreads();
  if (is_split()) launch_dependents();
  if (threadIdx.x < 128) {
    release_registers<kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp == 0) {
      feed_keys(p, s);
    } else if (warp <= kGroups) {
      scout(p, s, warp - 1);
    }
  } else {
    claim_registers<kConsumerRegisters>();
    Consumer consumer(p, s);
    wait_for_prerequisites();
    for (int next = 0; consumer.begin(next); ++next) consumer.attend();
  }
}
