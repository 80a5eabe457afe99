// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup: 64 queries against the blocks of keys.
#pragma once

#include "consumer_base.cuh"
#include "ptx/bulk.cuh"
#include "ptx/named_barrier.cuh"

namespace sagert {

constexpr float kLog2PScale = kV == V::kIo ? 8.f : 8.807354922057604f;  // log2(448): P fills e4m3's range
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

// Scores are integers, then the exponentials' bits, then, in the first registers, P.
struct Consumer : ConsumerBase {
  static constexpr int kWeights = kBlock / (kV == V::kIo ? 4 : 8);  // registers of P

  using ConsumerBase::ConsumerBase;

  __device__ __forceinline__ void issue_pv(Scores& scores, bool ready) {
    take_v(ready);
    const uint32_t* weights = reinterpret_cast<uint32_t*>(scores);
    wgmma_fence();
    if constexpr (kV == V::kIo) {
      uint64_t b = descriptor_io(shared_address(s.v[v_last]));
#pragma unroll
      for (int i = 0; i < kBlock / 16; ++i) wgmma_io(o, weights + 4 * i, b + i * (16 * kMapWidth * 2 >> 4));
    } else {
      uint64_t b = descriptor<kBlock>(shared_address(s.v[v_last]));
#pragma unroll
      for (int i = 0; i < kBlock / 32; ++i) wgmma_e4m3(o, weights + 4 * i, b + 2 * i);
    }
    wgmma_commit();
  }

  // Row maxima are taken on the integers: a thread's keys of a row share one scale.
  __device__ __forceinline__ Scaling reduce(const Scores& scores, const float (&b)[2], float k_scale) {
    Scaling z;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int top = row_top(scores, r);
      z.c[r] = s.q_scale[turn % 2][row() + 8 * r] * k_scale;
      advance_maximum(z, r, fmaf(static_cast<float>(top), z.c[r], -kLog2PScale), b[r]);
    }
    return z;
  }

  __device__ __forceinline__ void advance_maximum(Scaling& z, int r, float x, float b) {
    x = fmaxf(quad_max(x), -b);
    z.alpha[r] = exp2_approx(-b - x);
    z.b[r] = -x;
  }

  // The same for a block with masks.
  __device__ __forceinline__ Scaling reduce_masked(Scores& scores, const float (&b)[2], float k_scale, int block,
                                                   const Tile& tile, bool k_bad) {
    const uint32_t bad = bad_keys(tile, block, k_bad);
    Scaling z;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool undefined;
      const int top = mask_row(scores, r, tile, block, bad, undefined);
      z.c[r] = s.q_scale[turn % 2][row() + 8 * r] * k_scale;
      advance_maximum(z, r, top == kMasked ? kLowest : fmaf(static_cast<float>(top), z.c[r], -kLog2PScale), b[r]);
      // The exponent of a masked score must vanish beside b: with a tiny scale the scores move to a coarser one, whose
      // step is far below fp32's resolution of b.
      float c_min = fmaf(fmaxf(z.b[r], 0.f), 0x1p-30f, 0x1p-22f);
      if (z.c[r] < c_min) {
        coarsen_row(scores, r, z.c[r] / c_min);
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
      if constexpr (kV == V::kIo) {
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
    rescale(z.alpha);
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
    rescale(z.alpha);
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
        if (kV == V::kIo && kCausal && s.flags[turn % 2][1] != 0) clear_nonfinite();
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
    begin(tile);
    Scaling z;
    z.b[0] = z.b[1] = -kLowest;
    const bool k_bad = s.flags[turn % 2][0] != 0;
    attend_blocks(tile, z, masked_blocks(tile, k_bad), k_bad);
    write(index, {-z.b[0], -z.b[1]});
    end();
  }
};

}  // namespace sagert
