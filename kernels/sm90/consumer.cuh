// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup: 64 queries against the blocks of keys.
#pragma once

#include "ptx/bulk.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/wgmma.cuh"
#include "tile.cuh"

namespace sagert {

constexpr float kLog2PScale = kIoV ? 8.f : 8.807354922057604f;  // log2(448): P fills e4m3's range
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.402823466e38f;  // of a row that has seen no key
constexpr int kMasked = -2147483647 - 1;     // score of a key that a query does not see
// Exponentials before Q K^T of the next block is issued, and before its scores are waited for.
constexpr int kFirstCut = kHeadDim == 64 ? 8 : 24, kSecondCut = kHeadDim == 64 ? 40 : 56;

// Exponents of a block of keys are c * score + b; -b is the running maximum. alpha is what it costs the sums so far.
struct Scaling {
  float c[2], b[2], alpha[2];
};

template <int count>
__device__ __forceinline__ void wgmma_io(float (&d)[count], const uint32_t* a, uint64_t b) {
#if SAGERT_IO_BF16
  wgmma_bf16(d, a, b);
#else
  wgmma_f16(d, a, b);
#endif
}

struct Consumer {
  using Scores = int32_t[kBlock / 2];  // integers, then the exponentials' bits, then, in the first registers, P
  static constexpr int kWeights = kBlock / (kIoV ? 4 : 8);  // registers of P

  const Params& p;
  Shared& s;
  Ring<kStages> k, v;             // the blocks that come next
  uint32_t v_last = kStages - 1;  // stage of the block of V before
  uint32_t turn = 0;              // tiles taken so far
  uint64_t q_descriptor;
  const float* k_scales;
  float l[2];
  float o[kHeadDim / 2];

  __device__ __forceinline__ Consumer(const Params& params, Shared& shared) : p(params), s(shared) {}

  // Columns 8 j + 2 quad + {0, 1} and rows row + {0, 8} of the tile are this thread's.
  static __device__ __forceinline__ int quad() { return threadIdx.x % 4; }
  static __device__ __forceinline__ int row() { return (threadIdx.x - 128) / 32 * 16 + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ bool leader() { return threadIdx.x % 32 == 0; }

  __device__ __forceinline__ bool k_ready() { return mbarrier_try(shared_address(&s.full_k[k.stage]), k.parity); }
  __device__ __forceinline__ bool v_ready() { return mbarrier_try(shared_address(&s.full_v[v.stage]), v.parity); }
  // Scale of this thread's keys of the next block, counting down.
  __device__ __forceinline__ float next_k_scale() {
    float scale = __ldg(k_scales);
    k_scales -= 4;
    return scale;
  }

  __device__ __forceinline__ void issue_qk(Scores& scores, bool ready) {
    if (!ready) mbarrier_wait(shared_address(&s.full_k[k.stage]), k.parity);
    uint64_t b = descriptor<kHeadDim>(shared_address(s.k[k.stage]));
    wgmma_fence();
    wgmma_s8<0>(scores, q_descriptor, b);
#pragma unroll
    for (int i = 1; i < kHeadDim / 32; ++i) wgmma_s8<1>(scores, q_descriptor + 2 * i, b + 2 * i);
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_pv(Scores& scores, bool ready) {
    if (!ready) mbarrier_wait(shared_address(&s.full_v[v.stage]), v.parity);
    const uint32_t* weights = reinterpret_cast<uint32_t*>(scores);
    wgmma_fence();
    if constexpr (kIoV) {
      uint64_t b = descriptor_io(shared_address(s.v[v.stage]));
#pragma unroll
      for (int i = 0; i < kBlock / 16; ++i) wgmma_io(o, weights + 4 * i, b + i * (16 * kMapWidth * 2 >> 4));
    } else {
      uint64_t b = descriptor<kBlock>(shared_address(s.v[v.stage]));
#pragma unroll
      for (int i = 0; i < kBlock / 32; ++i) wgmma_e4m3(o, weights + 4 * i, b + 2 * i);
    }
    wgmma_commit();
    v_last = v.stage;
    v.advance();
  }

  __device__ __forceinline__ void release_k() {
    if (leader()) mbarrier_arrive(shared_address(&s.empty_k[k.stage]));
    k.advance();
  }

  // Gives back the block of V before the present one, the last one of the tile before included.
  __device__ __forceinline__ void release_v() {
    if (leader()) mbarrier_arrive(shared_address(&s.empty_v[v_last]));
  }

  // Row maxima are taken on the integers: a thread's keys of a row share one scale.
  __device__ __forceinline__ Scaling reduce(const Scores& scores, const float (&b)[2], float k_scale) {
    Scaling z;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int top[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int* x = scores + 32 * half + 2 * r;
        top[half] = max(x[0], x[1]);
#pragma unroll
        for (int i = 4; i < 32; i += 4) top[half] = max(max(top[half], x[i]), x[i + 1]);
      }
      z.c[r] = s.q_scale[turn % 2][row() + 8 * r] * k_scale;
      advance_maximum(z, r, fmaf(static_cast<float>(max(top[0], top[1])), z.c[r], -kLog2PScale), b[r]);
    }
    return z;
  }

  __device__ __forceinline__ void advance_maximum(Scaling& z, int r, float x, float b) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
    x = fmaxf(x, -b);
    z.alpha[r] = exp2_approx(-b - x);
    z.b[r] = -x;
  }

  // Bit 2 j + e: key 8 j + 2 quad + e of a block, for this thread's quad, lies at `limit` or behind it.
  static __device__ __forceinline__ uint32_t beyond(int limit) {
    auto below = [&](int e) {  // how many j have their key before the limit
      return min(max((limit - 2 * quad() - e + 7) >> 3, 0), kBlock / 8);
    };
    uint64_t even = (uint64_t{1} << 2 * below(0)) - 1, odd = (uint64_t{1} << 2 * below(1)) - 1;
    return ~(static_cast<uint32_t>(even) & 0x55555555u | static_cast<uint32_t>(odd) & 0xaaaaaaaau);
  }

  // The same for a block that holds the end of the keys, the causal diagonal, or keys with an infinity or a NaN.
  __device__ __forceinline__ Scaling reduce_masked(Scores& scores, const float (&b)[2], float k_scale, int block,
                                                   const Tile& tile, bool k_bad) {
    uint32_t bad = 0;  // bits as in beyond()
    if (k_bad) bad = p.k_bad[(static_cast<int64_t>(tile.head / p.group) * p.blocks + block) * 4 + quad()];
    Scaling z;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int limit = p.seqlen_k - block * kBlock;
      if constexpr (kCausal) limit = min(limit, tile.row + row() + 8 * r + 1 - block * kBlock);
      const uint32_t hidden = beyond(limit);
      bool undefined = false;  // the score of a visible bad key is +inf or NaN, which ends the row, or -inf
      int top = kMasked;
#pragma unroll
      for (int n = 0; n < kBlock / 4; ++n) {
        int& x = scores[n / 2 * 4 + 2 * r + n % 2];
        if (bad >> n & ~hidden >> n & 1) undefined = undefined || x >= 0;
        if ((hidden | bad) >> n & 1) x = kMasked;
        top = max(top, x);
      }
      pin(scores);  // keeps the compiler from spreading the two rows over more registers than there are
      z.c[r] = s.q_scale[turn % 2][row() + 8 * r] * k_scale;
      advance_maximum(z, r, top == kMasked ? kLowest : fmaf(static_cast<float>(top), z.c[r], -kLog2PScale), b[r]);
      // The exponent of a masked score must vanish beside b: with a tiny scale the scores move to a coarser one, whose
      // step is far below fp32's resolution of b.
      float c_min = fmaf(fmaxf(z.b[r], 0.f), 0x1p-30f, 0x1p-22f);
      if (z.c[r] < c_min) {
        float ratio = z.c[r] / c_min;
#pragma unroll
        for (int n = 0; n < kBlock / 4; ++n) {
          int& x = scores[n / 2 * 4 + 2 * r + n % 2];
          if (x != kMasked) x = __float2int_rn(static_cast<float>(x) * ratio);
        }
        z.c[r] = c_min;
      }
      pin(scores);
      if (undefined) z.c[r] = nan();
    }
    return z;
  }

  template <int first, int last>
  __device__ __forceinline__ void exponentiate(Scores& scores, const Scaling& z, float (&sum)[4]) {
#pragma unroll
    for (int i = first; i < last; ++i) {
      const int r = i / 2 % 2;
      float e = exp2_approx(fmaf(static_cast<float>(scores[i]), z.c[r], z.b[r]));
      sum[i % 4] += e;
      scores[i] = __float_as_int(e);
    }
  }

  // The scores' fragment is the A operand of P V: of 16-bit V as it is, of V8 when its keys stand in pair order.
  __device__ __forceinline__ void pack(Scores& scores) {
#pragma unroll
    for (int j = 0; j < kBlock / 16; ++j) {
      auto e = [&](int i) { return __int_as_float(scores[8 * j + i]); };
      if constexpr (kIoV) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = to_io2(e(2 * i), e(2 * i + 1));
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[4 * j + i] = static_cast<int32_t>(words[i]);
      } else {
        uint32_t upper = pack_halves(to_e4m3x2(e(0), e(1)), to_e4m3x2(e(4), e(5)));
        uint32_t lower = pack_halves(to_e4m3x2(e(2), e(3)), to_e4m3x2(e(6), e(7)));
        scores[2 * j] = static_cast<int32_t>(upper);
        scores[2 * j + 1] = static_cast<int32_t>(lower);
      }
    }
  }

  // Stands between exponentials and a wait: without a branch that depends on them, ptxas moves them below it.
  __device__ __forceinline__ void hold(const float (&sum)[4]) {
    if (__any_sync(~0u, !(sum[0] + sum[1] + sum[2] + sum[3] < 1e37f))) __nanosleep(1);
  }

  // After P V of the block before: brings O to the present maximum.
  __device__ __forceinline__ void rescale(const Scaling& z) {
    if (__any_sync(~0u, z.alpha[0] != 1.f || z.alpha[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= z.alpha[i / 2 % 2];
    }
  }

  __device__ __forceinline__ void add(const Scaling& z, const float (&sum)[4]) {
    l[0] = fmaf(l[0], z.alpha[0], sum[0] + sum[1]);
    l[1] = fmaf(l[1], z.alpha[1], sum[2] + sum[3]);
  }

  // The block in `scores`; those of the next one come into `next`, which still holds P of the block before.
  __device__ __forceinline__ void step(Scores& scores, Scores& next, Scaling& z) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    const float scale = next_k_scale();
    bool ready = k_ready();
    exponentiate<0, kFirstCut>(scores, z, sum);
    hold(sum);
    wgmma_wait<0>();
    pin(o);
    pin_first<kWeights>(next);
    release_v();
    rescale(z);
    issue_qk(next, ready);
    exponentiate<kFirstCut, kSecondCut>(scores, z, sum);
    hold(sum);
    wgmma_wait<0>();
    pin(next);
    release_k();
    ready = v_ready();
    exponentiate<kSecondCut, 64>(scores, z, sum);
    add(z, sum);
    z = reduce(next, z.b, scale);
    pack(scores);
    pin_first<kWeights>(scores);
    pin(o);
    issue_pv(scores, ready);
  }

  __device__ __forceinline__ void last_step(Scores& scores, Scores& previous, const Scaling& z) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    exponentiate<0, 64>(scores, z, sum);
    hold(sum);
    wgmma_wait<0>();
    pin(o);
    pin_first<kWeights>(previous);
    release_v();
    rescale(z);
    add(z, sum);
    pack(scores);
    pin_first<kWeights>(scores);
    pin(o);
    issue_pv(scores, false);
    wgmma_wait<0>();
    pin(o);
    pin_first<kWeights>(scores);
  }

  // Zeroes the infinities and NaN of the next block of 16-bit V, which would reach even queries that do not see them;
  // add_nonfinite() gives them to those that do. The other warpgroup zeroes the same ones.
  __device__ __forceinline__ void clear_nonfinite() {
    mbarrier_wait(shared_address(&s.full_v[v.stage]), v.parity);
    constexpr uint32_t kExponent = SAGERT_IO_INFINITY;
    auto clear = [](uint32_t& pair) {
      if ((pair & kExponent) == kExponent) pair &= 0xffff0000u;
      if ((pair >> 16 & kExponent) == kExponent) pair &= 0xffffu;
    };
    uint4* tile = reinterpret_cast<uint4*>(s.v[v.stage]);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < kVTileBytes / 16; i += 128) {
      uint4 x = tile[i];
      clear(x.x), clear(x.y), clear(x.z), clear(x.w);
      tile[i] = x;
    }
    fence_async_shared();
    named_barrier(threadIdx.x / 128, 128);
  }

  // Waits for Q K^T of the next block; returns the scale of its keys.
  __device__ __forceinline__ float take_scores(Scores& scores) {
    const float scale = next_k_scale();
    issue_qk(scores, false);
    wgmma_wait<0>();
    pin(scores);
    release_k();
    return scale;
  }

  // All blocks, from the last one down, the first `masked` with a mask. The first one may hold the causal diagonal or
  // the end of the keys; with keys that are not finite every block is masked, and one is done after the other. One turn
  // of the inner loop takes two, so that their scores keep their registers. There is one loop for both kinds because
  // ptxas finds no registers for the accumulators of two (C7512).
  __device__ __forceinline__ void attend_blocks(const Tile& tile, Scaling& z, int masked, bool k_bad) {
    Scores even, odd;
    int left = tile.end - tile.begin;
#pragma unroll 1
    while (left > 0) {
      float scale = take_scores(even);
      int count = left;
      if (masked > 0) {
        z = reduce_masked(even, z.b, scale, tile.begin + left - 1, tile, k_bad);
        --masked;
        if (k_bad) count = 1;
        if (kIoV && kCausal && s.flags[turn % 2][1] != 0) clear_nonfinite();
      } else {
        z = reduce(even, z.b, scale);
      }
      left -= count;
#pragma unroll 1
      for (int rest = count - 1;; rest -= 2) {
        if (rest == 0) {
          last_step(even, odd, z);
          break;
        }
        step(even, odd, z);
        if (rest == 1) {
          last_step(odd, even, z);
          break;
        }
        step(odd, even, z);
      }
    }
  }

  __device__ __forceinline__ void attend(int index) {
    const Tile tile = tile_at(p, index);
    mbarrier_wait(shared_address(&s.full_q[turn % 2]), turn / 2 & 1);
    q_descriptor = descriptor<kHeadDim>(shared_address(&s.q[turn % 2][row() / 64 * 64 * kHeadDim]));
    k_scales = p.k_scale + (static_cast<int64_t>(tile.head / p.group) * p.blocks + tile.end - 1) * 4 + quad();
    l[0] = l[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
    Scaling z;
    z.b[0] = z.b[1] = -kLowest;
    const bool k_bad = s.flags[turn % 2][0] != 0;
    const bool ragged = kCausal ? has_last_keys() : tile.end * kBlock > p.seqlen_k;
    attend_blocks(tile, z, k_bad ? tile.end - tile.begin : ragged ? 1 : 0, k_bad);
    write(index, z);
    __syncwarp();
    if (leader()) mbarrier_arrive(shared_address(&s.empty_q[turn % 2]));
    ++turn;
  }

  __device__ __forceinline__ void write(int index, const Scaling& z) {
    // Worked out anew: it would take registers in the loop over the keys.
    forget(index);
    const Tile tile = tile_at(p, index);
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] += __shfl_xor_sync(~0u, l[r], 1);
      l[r] += __shfl_xor_sync(~0u, l[r], 2);
      inverse[r] = p.seqlen_k == 0 ? 0.f : 1.f / l[r];
      const int query = tile.row + row() + 8 * r;
      if (quad() == 0 && query < p.seqlen_q) {
        const int64_t place = static_cast<int64_t>(tile.head) * p.seqlen_q + query;
        const float lse = __log2f(l[r]) - z.b[r], shift = s.q_shift[turn % 2][row() + 8 * r];
        if (is_split()) {
          write_part_lse(place, lse, shift);
        } else if (p.write_lse) {
          p.lse[place] = kLn2 * (lse + shift);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      float2 scale = make_float2(1.f, 1.f), mean = make_float2(0.f, 0.f);
      if constexpr (!kIoV) {
        scale = *reinterpret_cast<const float2*>(&s.v_scale[turn % 2][8 * j + 2 * quad()]);
        mean = *reinterpret_cast<const float2*>(&s.v_mean[turn % 2][8 * j + 2 * quad()]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        o[4 * j + 2 * r] = fmaf(o[4 * j + 2 * r] * inverse[r], scale.x, mean.x);
        o[4 * j + 2 * r + 1] = fmaf(o[4 * j + 2 * r + 1] * inverse[r], scale.y, mean.y);
      }
    }
    if (s.flags[turn % 2][1] != 0) add_nonfinite(tile);
    if (is_split()) {
      write_part(tile);
      return;
    }
    uint16_t* out = p.out + tile.head / p.heads_q * p.o_sb + tile.head % p.heads_q * p.o_sh;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = tile.row + row() + 8 * r;
      uint16_t* place = out + query * p.o_ss;
      if (p.o_vec) {
        write_row(place, r, query < p.seqlen_q);
      } else if (query < p.seqlen_q) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 4; ++i) {
          const int d = 8 * (i / 2) + 2 * quad() + i % 2;
          if (d < p.head_dim_v) place[d * p.o_sd] = static_cast<uint16_t>(to_io2(o[i / 2 * 4 + 2 * r + i % 2], 0.f));
        }
      }
    }
  }

  // In units of the exponent; the last row of the buffer has the shifts, which weigh all parts of a query alike.
  __device__ __forceinline__ void write_part_lse(int64_t place, float lse, float shift) {
    const int64_t rows = static_cast<int64_t>(p.heads_total) * p.seqlen_q;
    p.part_lse[blockIdx.y * rows + place] = lse;
    if (has_last_keys()) p.part_lse[gridDim.y * rows + place] = shift;
  }

  __device__ __forceinline__ void write_part(const Tile& tile) {
    const int64_t first = static_cast<int64_t>(blockIdx.y * p.heads_total + tile.head) * p.seqlen_q + tile.row + row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* place = p.part_out + (first + 8 * r) * kHeadDim + 2 * quad();
      if (tile.row + row() + 8 * r >= p.seqlen_q) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(place + 8 * j) = make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
      }
    }
  }

  // Stores row r of this thread. The 4 threads of a row have 2 of each 8 channels: they exchange them until each has 8,
  // for one store of 16 bytes. In exchange 1 and 2 a thread keeps the halves whose index has its own bit.
  __device__ __forceinline__ void write_row(uint16_t* place, int r, bool inside) {
    const bool odd = quad() & 1, upper = quad() & 2;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = to_io2(o[4 * (j + i) + 2 * r], o[4 * (j + i) + 2 * r + 1]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t got = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t got = __shfl_xor_sync(~0u, upper ? x[i] : x[i + 2], 2);
        (upper ? x[i] : x[i + 2]) = got;
      }
      if (inside) *reinterpret_cast<uint4*>(place + 8 * (j + quad())) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }

  // Infinities and NaN of V were left out of V8: each reaches exactly the rows that see its key.
  __device__ __forceinline__ void add_nonfinite(const Tile& tile) {
    const int* first = p.v_first + static_cast<int64_t>(tile.head / p.group) * 2 * kHeadDim + 2 * quad();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const int d = 8 * (i / 4) + i % 2;
      int seen = p.seqlen_k - 1;
      if constexpr (kCausal) seen = min(seen, tile.row + row() + 8 * (i / 2 % 2));
      if (first[d] <= seen) o[i] += infinity();
      if (first[kHeadDim + d] <= seen) o[i] -= infinity();
    }
  }
};

}  // namespace sagert
