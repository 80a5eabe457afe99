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
#ifndef PROMOTE
#define PROMOTE 0
#endif
#ifndef ORDER
#define ORDER 1
#endif
#ifndef OVERLAP
#define OVERLAP 1
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
  float k_scale[kStages][4];
  uint64_t full_k[kStages], full_v[kStages], empty_k[kStages], empty_v[kStages];
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

template <int group>
__device__ __forceinline__ void order_enter() {
#if ORDER
  named_sync<1 + group, 256>();
#endif
}
template <int group>
__device__ __forceinline__ void order_leave() {
#if ORDER
  named_arrive<2 - group, 256>();
#endif
}

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

template <int group>
__device__ __forceinline__ void consume(const Params& p, Shared& s) {
  const int thread = threadIdx.x % 128, lane = thread % 32, quad = lane % 4;
  const int warp = thread / 32;
  const bool leader = lane == 0;
  Ring kr, vr;
  int total = p.tiles * p.heads_total;
#if ORDER
  if (group == 1) named_arrive<1, 256>();
#endif
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    Tile t = tile_at(p, index);
    int row0 = t.row + group * 64 + warp * 16 + lane / 4;
    // Q: load, quantize.
    uint32_t q[kHeadDim / 8];
    float qs[2];
    {
      uint32_t raw[2][kHeadDim / 8];
      const uint16_t* base = p.Q + t.bh / p.heads_q * p.q_sb + t.bh % p.heads_q * p.q_sh;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int row = row0 + 8 * r;
        float amax = 0;
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
          uint2 x = make_uint2(0, 0);
          if (row < p.seqlen_q) x = *reinterpret_cast<const uint2*>(base + row * p.q_ss + 16 * i + 4 * quad);
          raw[r][2 * i] = x.x;
          raw[r][2 * i + 1] = x.y;
          amax = fmaxf(amax, fmaxf(fmaxf(fabsf(low_io(x.x)), fabsf(high_io(x.x))), fmaxf(fabsf(low_io(x.y)), fabsf(high_io(x.y)))));
        }
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
        float inv = amax < 1e-30f ? 0.f : 127.f / amax;
        qs[r] = amax * (1.f / 127.f) * p.scale_log2;
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
          uint32_t b0 = __float_as_uint(fmaf(low_io(raw[r][2 * i]), inv, 12582912.f));
          uint32_t b1 = __float_as_uint(fmaf(high_io(raw[r][2 * i]), inv, 12582912.f));
          uint32_t b2 = __float_as_uint(fmaf(low_io(raw[r][2 * i + 1]), inv, 12582912.f));
          uint32_t b3 = __float_as_uint(fmaf(high_io(raw[r][2 * i + 1]), inv, 12582912.f));
          uint32_t packed = __byte_perm(__byte_perm(b0, b1, 0x0040), __byte_perm(b2, b3, 0x0040), 0x5410);
          q[(i / 2) * 4 + (i % 2) * 2 + r] = packed;
        }
      }
    }
    int32_t sc[64];
    float o[kHeadDim / 2];
#if PROMOTE
    float acc[kHeadDim / 2];
    float a_prev[2] = {1.f, 1.f};
#endif
    uint32_t pk[16];
    float m[2] = {-3.4e38f, -3.4e38f}, l[2] = {0.f, 0.f};

    auto qk = [&](int stage) {
      uint64_t b = descriptor(shared_address(s.k[stage]), kHeadDim);
      wgmma_s8<0>(sc, q, b);
#pragma unroll
      for (int k = 1; k < kHeadDim / 32; ++k) wgmma_s8<1>(sc, q + 4 * k, b + 2 * k);
      wgmma_commit();
    };
    auto pv = [&](int stage) {
      uint64_t b = descriptor(shared_address(s.v[stage]), 128);
      wgmma_fence();
      wgmma_e4m3<PROMOTE ? 0 : 1>(o, pk, b);
#pragma unroll
      for (int k = 1; k < kBlock / 32; ++k) wgmma_e4m3<1>(o, pk + 4 * k, b + 2 * k);
      wgmma_commit();
    };
    float alpha[2];
    auto softmax = [&](int stage) {
      float ks = s.k_scale[stage][quad];
      float c0 = qs[0] * ks, c1 = qs[1] * ks;
      int i0 = max(sc[0], sc[1]), i1 = max(sc[2], sc[3]);
#pragma unroll
      for (int i = 4; i < 64; i += 4) {
        i0 = max(max(i0, sc[i]), sc[i + 1]);
        i1 = max(max(i1, sc[i + 2]), sc[i + 3]);
      }
      float x0 = fmaf(static_cast<float>(i0), c0, -kLog2PScale), x1 = fmaf(static_cast<float>(i1), c1, -kLog2PScale);
      x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 1));
      x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 1));
      x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 2));
      x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 2));
      float n0 = fmaxf(m[0], x0), n1 = fmaxf(m[1], x1);
      alpha[0] = exp2_approx(m[0] - n0);
      alpha[1] = exp2_approx(m[1] - n1);
      m[0] = n0;
      m[1] = n1;
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        float e0 = exp2_approx(fmaf(static_cast<float>(sc[i]), c0, -n0));
        float e1 = exp2_approx(fmaf(static_cast<float>(sc[i + 1]), c0, -n0));
        float e2 = exp2_approx(fmaf(static_cast<float>(sc[i + 2]), c1, -n1));
        float e3 = exp2_approx(fmaf(static_cast<float>(sc[i + 3]), c1, -n1));
        s0 += e0;
        s1 += e1;
        s2 += e2;
        s3 += e3;
        sc[i] = __float_as_int(e0);
        sc[i + 1] = __float_as_int(e1);
        sc[i + 2] = __float_as_int(e2);
        sc[i + 3] = __float_as_int(e3);
      }
      l[0] = fmaf(l[0], alpha[0], s0 + s1);
      l[1] = fmaf(l[1], alpha[1], s2 + s3);
    };
    auto pack = [&]() {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        auto e = [&](int i) { return __int_as_float(sc[8 * j + i]); };
        pk[2 * j] = pack_halves(to_e4m3x2(e(0), e(1)), to_e4m3x2(e(4), e(5)));
        pk[2 * j + 1] = pack_halves(to_e4m3x2(e(2), e(3)), to_e4m3x2(e(6), e(7)));
      }
    };
    auto mask = [&](int key0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        int key = key0 + 8 * (i / 4) + 2 * quad + (i & 1);
        int limit = p.seqlen_k;
#if CAUSAL
        limit = min(limit, row0 + 8 * ((i / 2) & 1) + 1);
#endif
        if (key >= limit) sc[i] = -(1 << 30);
      }
    };



    // First block.
    mbarrier_wait(shared_address(&s.full_k[kr.stage]), kr.parity);
    order_enter<group>();
    wgmma_fence();
    qk(kr.stage);
    order_leave<group>();
    wgmma_wait<0>();
    pin(sc);
    if (CAUSAL || t.blocks * kBlock > p.seqlen_k) mask((t.blocks - 1) * kBlock);
    softmax(kr.stage);
    if (leader) mbarrier_arrive(shared_address(&s.empty_k[kr.stage]));
    kr.advance();
    pack();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      o[i] = 0.f;
#if PROMOTE
      acc[i] = 0.f;
#endif
    }

#pragma unroll 1
    for (int j = 1; j < t.blocks; ++j) {
#if OVERLAP
      mbarrier_wait(shared_address(&s.full_k[kr.stage]), kr.parity);
      order_enter<group>();
      pin(sc);
      pin(o);
      pin(pk);
      wgmma_fence();
      qk(kr.stage);
      mbarrier_wait(shared_address(&s.full_v[vr.stage]), vr.parity);
      pv(vr.stage);
      order_leave<group>();
      wgmma_wait<1>();
      pin(sc);
      softmax(kr.stage);
      if (leader) mbarrier_arrive(shared_address(&s.empty_k[kr.stage]));
      kr.advance();
#if PROMOTE
      if (__any_sync(~0u, l[0] + l[1] > 1e37f)) __nanosleep(1);
      wgmma_wait<0>();
      pin(o);
      pin(pk);
      if (leader) mbarrier_arrive(shared_address(&s.empty_v[vr.stage]));
      vr.advance();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) acc[i] = fmaf(acc[i], a_prev[(i >> 1) & 1], o[i]);
      a_prev[0] = alpha[0];
      a_prev[1] = alpha[1];
#else
      bool rescale = __any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f || !(l[0] + l[1] < 1e37f));
      if (rescale) __nanosleep(0);
      wgmma_wait<0>();
      pin(o);
      pin(pk);
      if (leader) mbarrier_arrive(shared_address(&s.empty_v[vr.stage]));
      vr.advance();
      if (rescale) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= alpha[(i >> 1) & 1];
      }
#endif
      pack();
#endif
    }
    mbarrier_wait(shared_address(&s.full_v[vr.stage]), vr.parity);
    pin(o);
    pin(pk);
    wgmma_fence();
    pv(vr.stage);
    wgmma_wait<0>();
    pin(o);
    if (leader) mbarrier_arrive(shared_address(&s.empty_v[vr.stage]));
    vr.advance();
#if PROMOTE
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = fmaf(acc[i], a_prev[(i >> 1) & 1], o[i]);
#endif
    // Epilogue.
    float inv[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += __shfl_xor_sync(~0u, l[r], 1);
      l[r] += __shfl_xor_sync(~0u, l[r], 2);
      inv[r] = 1.f / l[r];
    }
    uint16_t* out = p.Out + t.bh / p.heads_q * p.o_sb + t.bh % p.heads_q * p.o_sh;
    const float* vs = p.VScale + static_cast<int64_t>(t.bh / p.group) * kHeadDim;
    const float* vm = p.VMean + static_cast<int64_t>(t.bh / p.group) * kHeadDim;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      float2 sv = *reinterpret_cast<const float2*>(vs + 8 * j + 2 * quad);
      float2 mv = *reinterpret_cast<const float2*>(vm + 8 * j + 2 * quad);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int row = row0 + 8 * r;
        if (row < p.seqlen_q) {
          *reinterpret_cast<uint32_t*>(out + row * p.o_ss + 8 * j + 2 * quad) =
              pack_io(fmaf(o[4 * j + 2 * r] * inv[r], sv.x, mv.x), fmaf(o[4 * j + 2 * r + 1] * inv[r], sv.y, mv.y));
        }
      }
    }
  }
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
    mbarrier_init_fence();
  }
  __syncthreads();
  int role = threadIdx.x / 128;
  if (role == 0) {
    release_registers<24>();
    if (threadIdx.x == 0) produce(p, s);
  } else {
    claim_registers<240>();
    if (role == 1) {
      consume<0>(p, s);
    } else {
      consume<1>(p, s);
    }
  }
}
