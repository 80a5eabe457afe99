// SPDX-License-Identifier: Apache-2.0
// Pre-pass of the mma family, second of two launches: smooths and quantizes K and V.
//
// A block takes K or V of one part of a head's keys, as kv_stats.cu has cut it, and goes through it 128 keys at a time,
// from the last ones down; blocks too come in the opposite order of kv_stats.cu's: what was read last is still in L2.
// Tiles of kBlock keys are laid out as attention's shared memory has them:
//   K8 tile [kBlock keys, bytes of a key]: 16-byte chunk c of row r at r * bytes + 16 * (c ^ swizzle(r)).
//   V8 tile [D, kBlock keys]: chunk c of channel d at kBlock * d + 16 * (c ^ swizzle(d)), each 16 keys in pair order.
// INT8 V has scales per tile and channel, in the order that write_scales gives them. fp16 V stays in rows of D. Where
// kScaleBlocks tiles share their scales, each has them.
#include "blocks.cuh"
#include "integers.cuh"
#include "kv_statistics.cuh"
#include "kv_tiles.cuh"
#include "ptx/minmax.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/numeric.cuh"

namespace sagert {

constexpr int kStepBlocks = kStepKeys / kBlock;
constexpr int kBlocksPerSm = BLOCKS_PER_SM;
// Of V in FP8: e4m3's largest, or what keeps the sum of 64 products with P of at most 448 within fp16.
constexpr float kLargestV = kV == V::kHalf ? 1.0f : ACCUMULATE != 0 ? 2.25f : 448.0f;
constexpr int kBuffers = kHeadDim > 128 ? 1 : 2;  // of tiles of V
static_assert(kStepBlocks == 2, "each warp has the keys of one scale of K");
static_assert(kStepBlocks % kScaleBlocks == 0, "scales are of one step");

struct alignas(128) Shared {
  uint8_t tile[kBuffers][kTiledV ? kStepBlocks * kTileBytes : 16];  // of V
  float shift[kHeadDim], inverse[kHeadDim];                         // kEvenV: its units in place of the inverse scales
  float stats[kStatsMax][kHeadDim];
  float v_amax[kBuffers][kInt8V ? kWarps : 1][kInt8V ? kHeadDim : 1];
  uint32_t k_amax[2][kWarps];  // of steps, in turns
  int64_t channel_stride;
  uint32_t norm;   // bits, of this block's keys
  float quietest;  // kEvenV: of a head's first keys, in units of the channels
};

// The keys that fall to this block: of a head with `blocks` blocks, in steps [first, last) of 128 keys.
struct Task {
  int64_t bh;
  int part, parts, blocks, first, last;
};

template <int statistic>
__device__ __forceinline__ float combine_parts(const float* stats, int parts, int stride) {
  float x = stats[0];
#pragma unroll 8
  for (int part = 1; part < parts; ++part) x = combine<statistic>(x, stats[static_cast<int64_t>(part) * stride]);
  return x;
}

// Whether a head's part has infinities or NaN; for all threads.
__device__ __forceinline__ bool any_nonfinite(const int* bad, int parts) {
  return __syncthreads_or(threadIdx.x < parts && bad[threadIdx.x] != 0) != 0;
}

// ---- K ----

struct KOut {
  int8_t* k8;
  float* scale;
  int *bad, *head_flags;
};

// The largest of the warps whose keys' blocks share a scale. `amax` has room for all warps, another in the next call.
__device__ __forceinline__ uint32_t share_magnitude(uint32_t (&amax)[kWarps], uint32_t own, int warp) {
  if (threadIdx.x % 32 == 0) amax[warp] = own;
  named_barrier(1 + warp % kKGroups, 32 * kScaleBlocks);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kScaleBlocks; ++i) largest = max(largest, amax[i * kKGroups + warp % kKGroups]);
  return largest;
}

__device__ __forceinline__ void quantize_k(Shared& s, const Input& in, KTile& tile, const Task& t, const KOut& out) {
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kChunks;  // of 8 channels
  float shift[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) shift[i] = s.shift[8 * chunk + i];
  int row = KTile::first_row();          // of the thread in a step
  constexpr int kShare = kInt4 ? 4 : 2;  // chunks of 8 channels in 16 bytes
  const int offset = row * kKRowBytes + 16 * swizzled<kKRowBytes>(chunk / kShare, row) + 16 / kShare * (chunk % kShare);
#pragma unroll 1
  for (int step = t.last - 1; step >= t.first; --step) {
    int warp = threadIdx.x / 32;
    int bh = static_cast<int>(t.bh);
    forget(row), forget(warp), forget(bh);  // what follows from them would take registers over all steps
    if (!in.vectors) tile.load(in, step * kStepKeys + row);

    Extrema<4> extrema = extrema_of(tile);
    uint32_t amax_bits = warp_magnitude(extrema, shift);
    const int rows_left = in.rows - step * kStepKeys;
    SpecialRows special;
    uint32_t bad = 0;
    if (rows_left < kStepKeys || amax_bits >= 0x7f800000u) {
      find_special_rows(extrema, tile, rows_left - row, special, bad);
      amax_bits = warp_magnitude(extrema, shift);
      if (bad != 0 && lane == 0) atomicOr(out.head_flags + 2 * bh, 1);
    }
    if constexpr (kScaleBlocks > 1) amax_bits = share_magnitude(s.k_amax[step & 1], amax_bits, warp);
    const int block = step * kStepBlocks + warp / kKGroups;
    if (block < t.blocks) {
      const float amax = __uint_as_float(amax_bits);
      if (lane == 0) {
        const int64_t at = (static_cast<int64_t>(bh) * t.blocks + block) * kKGroups + warp % kKGroups;
        out.scale[at] =
            fmaxf(amax * (1.0f / kCodeMax), kTiny);  // of a group that is zero any: attention wants it small
        out.bad[at] = static_cast<int>(bad);
      }
      const float inverse = amax < kTiny ? 0.0f : kCodeMax / amax;
      uint8_t* rows =
          reinterpret_cast<uint8_t*>(out.k8) + (static_cast<int64_t>(bh) * t.blocks + step * kStepBlocks) * kKTileBytes;
      // To look at every row costs no time here.
      const int squares = write_k_rows<true>(rows, offset, tile, shift, inverse, special);
      if constexpr (kNormsOfK) {  // for each step anew: a register over all steps is not there
        const float norm = norm_bound(sqrtf(static_cast<float>(squares)) * (amax * (1.0f / kCodeMax)));
        if (lane == 0) atomicMax(&s.norm, __float_as_uint(norm));
      }
    }
    forget(row);
    if (in.vectors && step > t.first) tile.load(in, (step - 1) * kStepKeys + row);
  }
}

// ---- V ----

struct VPointers {
  VOut* v8;
  VScaleType* scale;
};

// The largest magnitude of the quietest of a head's first keys, in units of the channels; by the first warp.
__device__ __forceinline__ float quietest_key(const Shared& s, const VTile& tile, const float (&shift)[kVChannels],
                                              int keys) {
  float least = infinity();
#pragma unroll
  for (int key = 0; key < kSinkKeys; ++key) {
    float largest = 0.f;
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) {
      largest = fmaxf(largest, fabsf(tile.get<true>(key, e, shift, keys)) / s.inverse[kVChannels * threadIdx.x + e]);
    }
    largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
    if (key < keys) least = fminf(least, largest);
  }
  return least;
}

// Scales, as bf16, of channels in the head's units, or, in an even block, the factor of all of them: negative, the
// first word of the scales. The inverses take the place of `amax`, the channels' largest magnitudes. The first block is
// not even where it has a key like an attention sink, of which most queries read V alone: its V is small.
__device__ __forceinline__ void scale_in_units(const Shared& s, int channel, float (&amax)[kVChannels],
                                               uint32_t (&bits)[kVChannels], int block) {
  constexpr float kLeast = 1e-20f;  // below this the factor's inverse could overflow
  float unit[kVChannels], largest = 0.f, squares = 0.f;
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) {
    unit[e] = s.inverse[channel + e];
    amax[e] = amax[e] < kTiny ? 0.f : amax[e] / unit[e];
    largest = fmaxf(largest, amax[e]);
  }
  largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) squares += amax[e] / largest * (amax[e] / largest);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
  const bool loud = block != 0 || s.quietest >= kSinkLoudness * largest;
  const bool even = loud && largest >= kLeast && squares * (kEvenSpread * kEvenSpread) >= kHeadDim;
  if (even) {
    const float factor = largest * (1.0f / 127.0f);
    const uint32_t word = channel == 0 ? __float_as_uint(-factor) : 0;
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) {
      bits[e] = e < 2 ? word >> 16 * e & 0xffffu : 0;
      amax[e] = 1.0f / (factor * unit[e]);
    }
  } else {
    scale_channels(amax, bits);
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) amax[e] /= unit[e];
  }
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) amax[e] = block % 2 == 0 ? amax[e] : -amax[e];
}

// Scales of the channels of this thread for the block that its warp has keys of; their inverses in `inverse`.
__device__ __forceinline__ void scale_block(const Shared& s, int turn, float (&inverse)[kVChannels], int block,
                                            bool inside, VScaleType* scale) {
  constexpr int kSharing = kVWarps * kScaleBlocks;  // warps
  const int warp = threadIdx.x / 32, channel = kVChannels * (threadIdx.x % 32);
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) inverse[e] = 0.0f;
#pragma unroll
  for (int i = 0; i < kSharing; ++i) {
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) {
      inverse[e] = fmaxf(inverse[e], s.v_amax[turn][warp / kSharing * kSharing + i][channel + e]);
    }
  }
  uint32_t bits[kVChannels];
  if constexpr (kEvenV) {
    scale_in_units(s, channel, inverse, bits, block);
  } else {
    scale_channels(inverse, bits);
  }
  if (inside && warp % kVWarps == 0) write_scales(bits, channel, scale);
}

__device__ __forceinline__ void quantize_v(Shared& s, const Input& in, VTile& tile, const Task& t,
                                           const VPointers& out) {
  constexpr int kStepBytes = kStepBlocks * kTileBytes;
  int turn = 0;
#pragma unroll 1
  for (int step = t.last - 1; step >= t.first; --step, turn ^= kBuffers - 1) {
    int bh = static_cast<int>(t.bh), warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = VTile::first_row();
    forget(bh), forget(lane), forget(first_row);   // what follows from them would take registers over all tiles
    float shift[kVChannels], inverse[kVChannels];  // read for each tile: registers are short
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) {
      shift[e] = s.shift[kVChannels * lane + e];
      if constexpr (!kInt8V) inverse[e] = s.inverse[kVChannels * lane + e];
    }
    if (!in.vectors) tile.load(in, step * kStepKeys + first_row);
    const int rows_left = in.rows - step * kStepKeys;
    if constexpr (kInt8V) {
      float amax[kVChannels];
      channel_amax<true>(amax, tile, shift, rows_left - first_row);
#pragma unroll
      for (int e = 0; e < kVChannels; ++e) s.v_amax[turn][warp][kVChannels * lane + e] = amax[e];
      if (kEvenV && step == 0 && warp == 0) s.quietest = quietest_key(s, tile, shift, rows_left);
      __syncthreads();
      const int block = step * kStepBlocks + warp / kVWarps;
      scale_block(s, turn, inverse, block, block < t.blocks,
                  out.scale + (static_cast<int64_t>(bh) * t.blocks + block) * kHeadDim);
    }
    if constexpr (kBuffers == 1 && !kInt8V) __syncthreads();  // nobody reads the tile before any more
    write_v_tile<true>(s.tile[turn], tile, shift, inverse, rows_left - first_row);
    forget(first_row);
    if (in.vectors && step > t.first) tile.load(in, (step - 1) * kStepKeys + first_row);
    __syncthreads();  // and, of two tiles, no thread still reads the other one
    const int bytes = min(t.blocks - step * kStepBlocks, kStepBlocks) * kTileBytes;
    uint8_t* place =
        reinterpret_cast<uint8_t*>(out.v8) + (static_cast<int64_t>(bh) * t.blocks + step * kStepBlocks) * kTileBytes;
#pragma unroll
    for (int i = 0; i < kStepBytes / 16 / kThreads; ++i) {
      const int at = 16 * (i * kThreads + static_cast<int>(threadIdx.x));
      if (at < bytes) *reinterpret_cast<uint4*>(place + at) = *reinterpret_cast<const uint4*>(s.tile[turn] + at);
    }
  }
}

// Rows [row, end) of V in fp16, 0 where there is no finite value.
__device__ __forceinline__ void scale_v(const Shared& s, const Input& in, int row, int end, VOut* out) {
  const int channel = 8 * (threadIdx.x % kChunks);
  float shift[8], inverse[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) shift[j] = s.shift[channel + j], inverse[j] = s.inverse[channel + j];
  write_rows(in, row, end, out, [&](const uint32_t (&x)[4], int at) {
    uint32_t y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      auto scaled = [&](float value, int e) {
        return at < in.rows && is_finite(value) ? (value - shift[e]) * inverse[e] : 0.0f;
      };
      y[j] = to_fp16x2(scaled(low_io(x[j]), 2 * j), scaled(high_io(x[j]), 2 * j + 1));
    }
    return make_uint4(y[0], y[1], y[2], y[3]);
  });
}

// The smallest power of two not below x, which is positive.
__device__ __forceinline__ float power_above(float x) {
  constexpr uint32_t kMantissa = 0x7fffffu;
  return __uint_as_float(min(__float_as_uint(x) + kMantissa, 0x7effffffu) & ~kMantissa);
}

// ---- Jobs ----

struct Params {
  const float *k_sum, *v_stats;
  const int *part_bad, *part_first;
  KOut k;
  float* k_shift;
  VPointers v;
  float* v_mean;
  int *v_first, *head_flags;
  bool smooth_k, copy_v, has_v_stats;
};

__device__ __forceinline__ void run_k(Shared& s, const Params& p, const Input& in, const Task& t) {
  KTile tile;
  if (in.vectors) tile.load(in, (t.last - 1) * kStepKeys + KTile::first_row());
  const int channel = threadIdx.x;
  if (channel < kHeadDim) {
    const float* sums = p.k_sum + t.bh * t.parts * kHeadDim + channel;
    float shift = combine_parts<kSum>(sums, t.parts, kHeadDim) / static_cast<float>(Sample(in.rows).count);
    if (!p.smooth_k || !(fabsf(shift) < kShiftMax)) shift = 0.0f;
    s.shift[channel] = shift;
    if (t.part == 0) p.k_shift[t.bh * kHeadDim + channel] = shift;
  }
  __syncthreads();
  quantize_k(s, in, tile, t, p.k);
}

// Shift and inverse scale, or unit, of one channel of V, in s; part 0 writes what attention needs.
__device__ __forceinline__ void finish_v_channel(Shared& s, const Params& p, const Task& t, int rows, int channel) {
  const int64_t at = t.bh * (kHeadDim * (1 + kEvenV)) + channel;
  const float count = static_cast<float>(rows);
  const float mean = s.stats[kSum][channel] / count, square = s.stats[kSquares][channel] / count;
  const float shift = v_shift(mean, square);
  s.shift[channel] = shift;
  if constexpr (kEvenV) {
    const float unit = v_unit(mean, square, shift);
    s.inverse[channel] = unit;
    if (t.part == 0) p.v_mean[at + kHeadDim] = unit;
  }
  if (t.part == 0) p.v_mean[at] = shift;
  if constexpr (!kInt8V) {
    const float amax = fmaxf(s.stats[kMax][channel] - shift, shift - s.stats[kMin][channel]);
    const bool zero = !(amax >= kTiny);  // also where nothing is finite
    const float largest = kV == V::kHalf ? power_above(amax) : amax;
    s.inverse[channel] = zero ? 0.0f : kLargestV / largest;
    if (t.part == 0) p.v.scale[at] = static_cast<VScaleType>(zero ? 1.0f : largest * (1.0f / kLargestV));
  }
}

template <int statistic>
__device__ __forceinline__ void combine_channel(Shared& s, const Params& p, const Task& t, int channel) {
  constexpr int kStride = kStatsMax * kHeadDim;
  const float* stats = p.v_stats + t.bh * t.parts * kStride + statistic * kHeadDim + channel;
  s.stats[statistic][channel] = combine_parts<statistic>(stats, t.parts, kStride);
}

// First keys of each channel that are +inf or NaN, and -inf or NaN.
__device__ __forceinline__ void write_first_keys(const Params& p, const Task& t, bool nonfinite) {
  for (int i = threadIdx.x; i < 2 * kHeadDim; i += kThreads) {
    int first = kNever;
    for (int part = 0; nonfinite && part < t.parts; ++part) {
      if (p.part_bad[t.bh * t.parts + part] == 0) continue;
      first = min(first, p.part_first[(t.bh * t.parts + part) * 2 * kHeadDim + i]);
    }
    p.v_first[t.bh * 2 * kHeadDim + i] = first;
  }
}

__device__ __forceinline__ void run_v(Shared& s, const Params& p, const Input& in, const Task& t) {
  if (kQuantizedV || p.has_v_stats) {
    const bool nonfinite = any_nonfinite(p.part_bad + t.bh * t.parts, t.parts);
    if (t.part == 0) {
      write_first_keys(p, t, nonfinite);
      if (threadIdx.x == 0) p.head_flags[2 * t.bh + 1] = nonfinite;
    }
  }
  if constexpr (kQuantizedV) {
    for (int i = threadIdx.x; i < 2 * kHeadDim; i += kThreads) {
      const int channel = i % kHeadDim;
      if (i < kHeadDim) {
        combine_channel<kSum>(s, p, t, channel);
        if constexpr (!kInt8V) combine_channel<kMin>(s, p, t, channel);
      } else {
        combine_channel<kSquares>(s, p, t, channel);
        if constexpr (!kInt8V) combine_channel<kMax>(s, p, t, channel);
      }
    }
    VTile tile;
    if (kTiledV && in.vectors) tile.load(in, (t.last - 1) * kStepKeys + VTile::first_row());
    __syncthreads();
    if (threadIdx.x < kHeadDim) finish_v_channel(s, p, t, in.rows, threadIdx.x);
    __syncthreads();
    if constexpr (kTiledV) {
      quantize_v(s, in, tile, t, p.v);
    } else {
      scale_v(s, in, t.first * kStepKeys, min(t.last * kStepKeys, t.blocks * kBlock),
              p.v.v8 + t.bh * t.blocks * kTileBytes);
    }
  } else if (p.copy_v) {
    copy_rows(in, t.first * kStepKeys, min(t.last * kStepKeys, t.blocks * kBlock),
              p.v.v8 + t.bh * t.blocks * kTileBytes);
  }
}

}  // namespace sagert

// Grid: parts * B * Hk blocks, twice as many with v_jobs.
extern "C" __global__ void __launch_bounds__(sagert::kThreads, sagert::kBlocksPerSm)
    quantize_kv(const uint16_t* K, const uint16_t* V, const float* KSum, const float* VStats, const int* PartBad,
                const int* PartFirst, int8_t* K8, float* KScale, int* KBad, float* KShift, float* KNorm,
                sagert::VOut* V8, sagert::VScaleType* VScale, float* VMean, int* VFirst, int* HeadFlags, int seqlen_k,
                int blocks, int heads_kv, int head_dim, int head_dim_v, int smooth_k, int v_jobs, int copy_v,
                int v_stats, int parts, int part_rows, int64_t k_sb, int64_t k_sh, int64_t k_ss, int64_t k_sd,
                int64_t v_sb, int64_t v_sh, int64_t v_ss, int64_t v_sd, int k_vec, int v_vec) {
  using namespace sagert;
  __shared__ Shared s;
  int index = gridDim.x - 1 - blockIdx.x;
  const int job = index / parts;
  const bool is_v = v_jobs != 0 && job % 2 == 1;
  if (threadIdx.x == 0) {
    s.channel_stride = is_v ? v_sd : k_sd;
    s.norm = 0;
  }
  __syncthreads();
  Task t;
  t.bh = v_jobs != 0 ? job / 2 : job;
  t.part = index % parts;
  t.parts = parts;
  t.blocks = blocks;
  t.first = t.part * (part_rows / kStepKeys);
  t.last = min(t.first + part_rows / kStepKeys, (blocks + kStepBlocks - 1) / kStepBlocks);
  const int64_t b = t.bh / heads_kv, h = t.bh % heads_kv;
  const Params p{KSum,          VStats,       PartBad,     PartFirst, {K8, KScale, KBad, HeadFlags},
                 KShift,        {V8, VScale}, VMean,       VFirst,    HeadFlags,
                 smooth_k != 0, copy_v != 0,  v_stats != 0};
  if (is_v) {
    Input in{V + b * v_sb + h * v_sh, v_ss, &s.channel_stride, seqlen_k, head_dim_v, v_vec != 0};
    run_v(s, p, in, t);
  } else {
    Input in{K + b * k_sb + h * k_sh, k_ss, &s.channel_stride, seqlen_k, head_dim, k_vec != 0};
    run_k(s, p, in, t);
    if constexpr (kNormsOfK) {
      __syncthreads();
      forget(index);  // worked out anew: kept, it would take registers from the loads
      const int64_t head = index / parts / (v_jobs != 0 ? 2 : 1);
      if (threadIdx.x == 0) write_norm(KNorm + head * kNormSlots, __uint_as_float(s.norm), index % parts, parts);
    }
  }
}
