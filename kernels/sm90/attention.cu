// SPDX-License-Identifier: Apache-2.0
// Attention of the sm90 wgmma family: INT8 Q K^T, FP8 P V.
#include "integers.cuh"

#include "ptx/bulk.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/numeric.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

#ifndef STAGES
#define STAGES 4
#endif
#ifndef SPLIT_A
#define SPLIT_A 24
#endif
#ifndef SPLIT_B
#define SPLIT_B 48
#endif
#ifndef PRODUCER_REGS
#define PRODUCER_REGS 40
#define CONSUMER_REGS 232
#endif

namespace sagert {
using namespace ptx;

constexpr int kHeadDim = HEAD_DIM;
constexpr int kBlock = 128;                    // keys
constexpr int kGroups = 2;                     // consumer warpgroups
constexpr int kRows = 64 * kGroups;            // queries per tile
constexpr int kStages = STAGES;
constexpr int kTileBytes = kBlock * kHeadDim;  // of K8 and of V8
constexpr int kThreads = 128 * (kGroups + 1);
constexpr float kLog2PScale = 8.807354922057604f;  // log2(448): P arrives in e4m3's range

struct Shared {
  int8_t k[kStages][kTileBytes];
  int8_t v[kStages][kTileBytes];
  int8_t q[2][kRows * kHeadDim];
  float k_scale[kStages][4];
  float q_scale[2][kRows];
  float v_scale[2][kHeadDim], v_mean[2][kHeadDim];
  uint64_t full_k[kStages], full_v[kStages], empty_k[kStages], empty_v[kStages], full_q[2], empty_q[2];
};

// Descriptor of a K-major operand whose rows are `row_bytes` (64 or 128), swizzled over them.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int row_bytes) {
  uint64_t layout = row_bytes == 128 ? 1 : 2;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         static_cast<uint64_t>(8 * row_bytes >> 4) << 32 | layout << 62;
}

__device__ __forceinline__ float load_io(const uint16_t* p) {
#if Q_BF16
  return __uint_as_float(static_cast<uint32_t>(*p) << 16);
#else
  return from_fp16(*p);
#endif
}
__device__ __forceinline__ float low_io(uint32_t pair) {
#if Q_BF16
  return __uint_as_float(pair << 16);
#else
  return from_fp16(static_cast<uint16_t>(pair));
#endif
}
__device__ __forceinline__ float high_io(uint32_t pair) {
#if Q_BF16
  return __uint_as_float(pair & 0xffff0000u);
#else
  return from_fp16(static_cast<uint16_t>(pair >> 16));
#endif
}
__device__ __forceinline__ uint32_t pack_io(float low, float high) {
#if Q_BF16
  return to_bf16x2(low, high);
#else
  return to_fp16x2(low, high);
#endif
}

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Params {
  const uint16_t* Q;
  const int8_t* K8;
  const float* KScale;
  const int8_t* V8;
  const float* VScale;
  const float* VMean;
  uint16_t* Out;
  float scale_log2;
  int seqlen_q, seqlen_k, blocks, heads_q, group, tiles, heads_total;
  int64_t q_sb, q_sh, q_ss, o_sb, o_sh, o_ss;
  int* TileCounter;
  int section;
};

struct Tile {
  int bh, row, blocks;
};
__device__ __forceinline__ Tile tile_at(const Params& p, int index) {
  Tile t;
#if CAUSAL
  t.bh = index % p.heads_total;
  int q = p.tiles - 1 - index / p.heads_total;
#else
  t.bh = index / p.tiles;
  int q = index % p.tiles;
#endif
  t.row = q * kRows;
  t.blocks = p.blocks;
#if CAUSAL
  t.blocks = min(t.blocks, q + 1);
#endif
  return t;
}

__device__ __forceinline__ void produce(const Params& p, Shared& s) {
  Ring kr, vr;
  int total = p.tiles * p.heads_total;
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    Tile t = tile_at(p, index);
    int64_t base = static_cast<int64_t>(t.bh / p.group) * p.blocks;
    for (int step = 0; step <= t.blocks; ++step) {
      if (step < t.blocks) {
        int64_t j = base + t.blocks - 1 - step;
        mbarrier_wait(shared_address(&s.empty_k[kr.stage]), kr.parity ^ 1);
        uint32_t full = shared_address(&s.full_k[kr.stage]);
        mbarrier_arrive_expect(full, kTileBytes + 16);
        bulk_load(shared_address(s.k[kr.stage]), p.K8 + j * kTileBytes, kTileBytes, full);
        bulk_load(shared_address(s.k_scale[kr.stage]), p.KScale + j * 4, 16, full);
        kr.advance();
      }
      if (step > 0) {
        int64_t j = base + t.blocks - step;
        mbarrier_wait(shared_address(&s.empty_v[vr.stage]), vr.parity ^ 1);
        uint32_t full = shared_address(&s.full_v[vr.stage]);
        mbarrier_arrive_expect(full, kTileBytes);
        bulk_load(shared_address(s.v[vr.stage]), p.V8 + j * kTileBytes, kTileBytes, full);
        vr.advance();
      }
    }
  }
}


// Loads and quantizes the queries of each tile: 3 warps, 4 lanes to a row.
__device__ __forceinline__ void quantize_queries(const Params& p, Shared& s) {
  const int thread = threadIdx.x - 32, quad = thread % 4;
  int slot = 0;
  uint32_t parity = 0;
  int total = p.tiles * p.heads_total;
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    Tile t = tile_at(p, index);
    mbarrier_wait(shared_address(&s.empty_q[slot]), parity ^ 1);
    const uint16_t* base = p.Q + t.bh / p.heads_q * p.q_sb + t.bh % p.heads_q * p.q_sh;
    constexpr int kPerLane = kHeadDim / 4, kVectors = kPerLane / 8;
    for (int r = thread / 4; r < kRows; r += 24) {
      int row = t.row + r;
      uint4 x[kVectors];
      float amax = 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        x[i] = make_uint4(0, 0, 0, 0);
        if (row < p.seqlen_q) x[i] = *reinterpret_cast<const uint4*>(base + row * p.q_ss + (quad * kVectors + i) * 8);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        uint32_t w[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) amax = fmaxf(amax, fmaxf(fabsf(low_io(w[e])), fabsf(high_io(w[e]))));
      }
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
      float inv = amax < 1e-30f ? 0.f : 127.f / amax;
      if (quad == 0) s.q_scale[slot][r] = amax * (1.f / 127.f) * p.scale_log2;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        uint32_t w[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
        uint32_t packed[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t b0 = __float_as_uint(fmaf(low_io(w[2 * e]), inv, 12582912.f));
          uint32_t b1 = __float_as_uint(fmaf(high_io(w[2 * e]), inv, 12582912.f));
          uint32_t b2 = __float_as_uint(fmaf(low_io(w[2 * e + 1]), inv, 12582912.f));
          uint32_t b3 = __float_as_uint(fmaf(high_io(w[2 * e + 1]), inv, 12582912.f));
          packed[e] = __byte_perm(__byte_perm(b0, b1, 0x0040), __byte_perm(b2, b3, 0x0040), 0x5410);
        }
        int vector = quad * kVectors + i;  // 8 channels
        int chunk = vector / 2 ^ (kHeadDim == 128 ? r & 7 : (r >> 1) & 3);
        *reinterpret_cast<uint2*>(&s.q[slot][r * kHeadDim + chunk * 16 + vector % 2 * 8]) = make_uint2(packed[0], packed[1]);
      }
    }
    const int64_t head = static_cast<int64_t>(t.bh / p.group) * kHeadDim;
    for (int i = thread; i < kHeadDim; i += 96) {
      s.v_scale[slot][i] = p.VScale[head + i];
      s.v_mean[slot][i] = p.VMean[head + i];
    }
    fence_async_shared();
    mbarrier_arrive(shared_address(&s.full_q[slot]));
    slot ^= 1;
    if (slot == 0) parity ^= 1;
  }
}

// What the softmax of one block of keys needs: exponents are c * score + b.
struct Scaling {
  float c[2], b[2], alpha[2];
};

struct Consumer {
  const Params& p;
  Shared& s;
  int quad, q_row;  // row of this thread within the tile
  bool leader;
  Ring kr, vr;
  int q_slot = 0;
  uint32_t q_parity = 0;
  uint64_t q_descriptor;
  float q_scale[2];
  float m[2], l[2];
  float o[kHeadDim / 2];

  __device__ __forceinline__ Consumer(const Params& p, Shared& s) : p(p), s(s) {}

  __device__ __forceinline__ void issue_qk(int32_t (&sc)[64]) {
    mbarrier_wait(shared_address(&s.full_k[kr.stage]), kr.parity);
    uint64_t b = descriptor(shared_address(s.k[kr.stage]), kHeadDim);
    wgmma_fence();
    wgmma_s8<0>(sc, q_descriptor, b);
#pragma unroll
    for (int k = 1; k < kHeadDim / 32; ++k) wgmma_s8<1>(sc, q_descriptor + 2 * k, b + 2 * k);
    wgmma_commit();
  }
  // P stands in the first 16 registers of its scores.
  __device__ __forceinline__ void issue_pv(int32_t (&sc)[64]) {
    mbarrier_wait(shared_address(&s.full_v[vr.stage]), vr.parity);
    uint64_t b = descriptor(shared_address(s.v[vr.stage]), 128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlock / 32; ++k) wgmma_e4m3<1>(o, reinterpret_cast<uint32_t*>(sc + 4 * k), b + 2 * k);
    wgmma_commit();
  }
  __device__ __forceinline__ void release_k() {
    if (leader) mbarrier_arrive(shared_address(&s.empty_k[kr.stage]));
    kr.advance();
  }
  __device__ __forceinline__ void release_v() {
    if (leader) mbarrier_arrive(shared_address(&s.empty_v[vr.stage]));
    vr.advance();
  }
  // Row maxima on the raw integers.
  __device__ __forceinline__ Scaling reduce(const int32_t (&sc)[64], float k_scale) {
    Scaling z;
    int top[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[r][h] = max(sc[32 * h + 2 * r], sc[32 * h + 2 * r + 1]);
#pragma unroll
        for (int i = 4; i < 32; i += 4) top[r][h] = max(max(top[r][h], sc[32 * h + i + 2 * r]), sc[32 * h + i + 2 * r + 1]);
      }
      z.c[r] = q_scale[r] * k_scale;
      float x = fmaf(static_cast<float>(max(top[r][0], top[r][1])), z.c[r], -kLog2PScale);
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
      x = fmaxf(m[r], x);
      z.alpha[r] = exp2_approx(m[r] - x);
      m[r] = x;
      z.b[r] = -x;
    }
    return z;
  }
  template <int first, int last>
  __device__ __forceinline__ void exponentiate(int32_t (&sc)[64], const Scaling& z, float (&sum)[4]) {
#pragma unroll
    for (int i = first; i < last; ++i) {
      int r = i / 2 % 2;
      float e = exp2_approx(fmaf(static_cast<float>(sc[i]), z.c[r], z.b[r]));
      sum[i % 4] += e;
      sc[i] = __float_as_int(e);
    }
  }
  __device__ __forceinline__ void pack(int32_t (&sc)[64]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      auto e = [&](int i) { return __int_as_float(sc[8 * j + i]); };
      uint32_t upper = pack_halves(to_e4m3x2(e(0), e(1)), to_e4m3x2(e(4), e(5)));
      uint32_t lower = pack_halves(to_e4m3x2(e(2), e(3)), to_e4m3x2(e(6), e(7)));
      sc[2 * j] = static_cast<int32_t>(upper);
      sc[2 * j + 1] = static_cast<int32_t>(lower);
    }
  }
  __device__ __forceinline__ void mask(int32_t (&sc)[64], int key0, int row) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      int key = key0 + 8 * (i / 4) + 2 * quad + (i & 1);
      int limit = p.seqlen_k;
#if CAUSAL
      limit = min(limit, row + 8 * ((i / 2) & 1) + 1);
#endif
      if (key >= limit) sc[i] = -(1 << 30);
    }
  }
  // Ends P V of the block before: O takes the scale of the present block. The vote before it is needed: without a branch
  // that depends on them, ptxas moves the exponentials below the wait.
  __device__ __forceinline__ void finish_pv(const Scaling& z, const float (&sum)[4], int32_t (&previous)[64]) {
    bool rescale = __any_sync(~0u, z.alpha[0] != 1.f || z.alpha[1] != 1.f || !(sum[0] + sum[1] + sum[2] + sum[3] < 1e37f));
    if (rescale) __nanosleep(0);
    wgmma_wait<0>();
    pin(o);
    pin(previous);
    if (rescale) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= z.alpha[(i >> 1) & 1];
    }
  }
  __device__ __forceinline__ void add(const Scaling& z, const float (&sum)[4]) {
    l[0] = fmaf(l[0], z.alpha[0], sum[0] + sum[1]);
    l[1] = fmaf(l[1], z.alpha[1], sum[2] + sum[3]);
  }
  // Block j: `cur` holds its scores; Q K^T of block j + 1 goes into `next` and runs under the exponentials.
  template <bool first>
  __device__ __forceinline__ void step(int32_t (&cur)[64], int32_t (&next)[64], Scaling& z) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    exponentiate<0, SPLIT_A>(cur, z, sum);
    finish_pv(z, sum, next);
    if (!first) release_v();
    issue_qk(next);
    exponentiate<SPLIT_A, SPLIT_B>(cur, z, sum);
    if (__any_sync(~0u, !(sum[0] + sum[1] + sum[2] + sum[3] < 1e37f))) __nanosleep(0);
    wgmma_wait<0>();
    pin(next);
    float k_scale = s.k_scale[kr.stage][quad];
    release_k();
    exponentiate<SPLIT_B, 64>(cur, z, sum);
    add(z, sum);
    z = reduce(next, k_scale);
    pack(cur);
    pin(cur);
    pin(o);
    issue_pv(cur);
  }
  __device__ __forceinline__ void last_step(int32_t (&cur)[64], int32_t (&previous)[64], const Scaling& z, bool first) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    exponentiate<0, 64>(cur, z, sum);
    finish_pv(z, sum, previous);
    add(z, sum);
    if (!first) release_v();
    pack(cur);
    pin(cur);
    pin(o);
    issue_pv(cur);
    wgmma_wait<0>();
    pin(o);
    release_v();
  }
  __device__ __forceinline__ void run_tile(const Tile& t) {
    int32_t sa[64], sb[64];
    const int row = t.row + q_row;
    mbarrier_wait(shared_address(&s.full_q[q_slot]), q_parity);
    q_scale[0] = s.q_scale[q_slot][q_row];
    q_scale[1] = s.q_scale[q_slot][q_row + 8];
    q_descriptor = descriptor(shared_address(&s.q[q_slot][q_row / 64 * 64 * kHeadDim]), kHeadDim);
    m[0] = m[1] = -3.4e38f;
    l[0] = l[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
    issue_qk(sa);
    wgmma_wait<0>();
    pin(sa);
    float k_scale = s.k_scale[kr.stage][quad];
    release_k();
    if (CAUSAL || t.blocks * kBlock > p.seqlen_k) mask(sa, (t.blocks - 1) * kBlock, row);
    Scaling z = reduce(sa, k_scale);
    int rest = t.blocks - 1;
    if (rest == 0) {
      last_step(sa, sb, z, true);
    } else {
      step<true>(sa, sb, z);
      for (;;) {
        if (--rest == 0) {
          last_step(sb, sa, z, false);
          break;
        }
        step<false>(sb, sa, z);
        if (--rest == 0) {
          last_step(sa, sb, z, false);
          break;
        }
        step<false>(sa, sb, z);
      }
    }
    float inv[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += __shfl_xor_sync(~0u, l[r], 1);
      l[r] += __shfl_xor_sync(~0u, l[r], 2);
      inv[r] = 1.f / l[r];
    }
    uint16_t* out = p.Out + t.bh / p.heads_q * p.o_sb + t.bh % p.heads_q * p.o_sh;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      float2 sv = *reinterpret_cast<const float2*>(&s.v_scale[q_slot][8 * j + 2 * quad]);
      float2 mv = *reinterpret_cast<const float2*>(&s.v_mean[q_slot][8 * j + 2 * quad]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r < p.seqlen_q) {
          *reinterpret_cast<uint32_t*>(out + (row + 8 * r) * p.o_ss + 8 * j + 2 * quad) =
              pack_io(fmaf(o[4 * j + 2 * r] * inv[r], sv.x, mv.x), fmaf(o[4 * j + 2 * r + 1] * inv[r], sv.y, mv.y));
        }
      }
    }
    if (leader) mbarrier_arrive(shared_address(&s.empty_q[q_slot]));
    q_slot ^= 1;
    if (q_slot == 0) q_parity ^= 1;
  }
};

__device__ __forceinline__ void consume(const Params& p, Shared& s) {
  Consumer c(p, s);
  const int thread = threadIdx.x - 128, lane = thread % 32;
  c.quad = lane % 4;
  c.q_row = thread / 32 * 16 + lane / 4;
  c.leader = lane == 0;
  int total = p.tiles * p.heads_total;
  for (int index = blockIdx.x; index < total; index += gridDim.x) c.run_tile(tile_at(p, index));
}

}  // namespace sagert

extern "C" __global__ void __launch_bounds__(sagert::kThreads, 1) attention(sagert::Params p) {
  using namespace sagert;
  extern __shared__ __align__(1024) char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw + ((1024 - (shared_address(raw) & 1023)) & 1023));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared_address(&s.full_k[i]), 1);
      mbarrier_init(shared_address(&s.full_v[i]), 1);
      mbarrier_init(shared_address(&s.empty_k[i]), 4 * kGroups);
      mbarrier_init(shared_address(&s.empty_v[i]), 4 * kGroups);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared_address(&s.full_q[i]), 96);
      mbarrier_init(shared_address(&s.empty_q[i]), 4 * kGroups);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    release_registers<PRODUCER_REGS>();
    if (threadIdx.x == 0) produce(p, s);
    if (threadIdx.x >= 32) quantize_queries(p, s);
  } else {
    claim_registers<CONSUMER_REGS>();
    consume(p, s);
  }
}
