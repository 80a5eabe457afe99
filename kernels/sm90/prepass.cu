// SPDX-License-Identifier: Apache-2.0
// Pre-pass of the sm90 wgmma family: smooths and quantizes K and V in one launch.
//
// A cluster of at most CLUSTER blocks does one job, K or V of one head. Each block takes a run of 128-key blocks. First
// come column statistics, of V's run or of some keys of K, combined over the cluster through distributed shared memory,
// then the quantization, of V from L2. Tiles are laid out in shared memory as wgmma reads them and leave through the
// copy engine:
//   K8 tile [128 keys, D]: 16-byte chunk c of row r at r * D + 16 * (c ^ swizzle(r)).
//   V8 tile [D, 128 keys]: chunk c of channel d at 128 * d + 16 * (c ^ (d & 7)), each 16 keys in pair order.
// INT8 V is raised by 128, and in odd blocks it is -V. It has scales per tile and two neighbouring channels, in the
// channels' units, which are their deviations. In an even tile the scales of a quarter of the channels are the same,
// and in others negative. Those of pairs 4 apart, which one lane of wgmma's fragment has, stand together. All
// statistics are combined in a fixed order: the same input gives the same bits.
#include "bounded.cuh"
#include "integers.cuh"
#include "leading.cuh"
#include "prepass_statistics.cuh"
#include "ptx/bulk.cuh"
#include "ptx/bulk_store.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/minmax.cuh"
#include "ptx/numeric.cuh"
#include "ptx/pdl.cuh"

#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM 2
#endif

namespace sagert {

constexpr bool kBounded = is_bounded_at(kHeadDim);

// ---- Phase 2 ----

// Two tiles in shared memory take turns: one is written while the copy engine reads the other. Blocks go down.
struct TileWriter {
  Shared& s;
  uint8_t* tiles;  // of the head, by block

  // Barrier between tile number `count` of this thread block, of `block`, and the one before, which it sends. Returns
  // room for the tile.
  __device__ __forceinline__ uint8_t* exchange(int count, int block) {
    if (threadIdx.x == 0) bulk_wait_read<0>();  // of the tile before the previous
    __syncthreads();
    if (count > 0) send(count - 1, block + 1);
    return s.tile[count & 1];
  }
  __device__ __forceinline__ void finish(int count, int block) {
    __syncthreads();
    send(count - 1, block);
    if (threadIdx.x == 0) bulk_wait<0>();
  }
  __device__ __forceinline__ void send(int count, int block) {
    if (threadIdx.x != 0) return;
    bulk_store(tiles + static_cast<int64_t>(block) * kTileBytes, shared_address(s.tile[count & 1]), kTileBytes);
    bulk_commit();
  }
};

// Quantizes blocks [first, last) of a head, whose last tile is loaded (vectors only: slow loads are not kept in
// flight). Sets *s.bad_keys where one holds an infinity or a NaN.
__device__ __forceinline__ void quantize_k(Shared& s, const Input& in, KTile& tile, int first, int last, int8_t* k8,
                                           float* k_scale, int* k_bad) {
  float norm = 0.0f;  // largest of this thread's channels
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int chunk = lane % kChunks;  // of 8 channels
  float shift[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) shift[i] = s.shift[8 * chunk + i];
  int row = KTile::first_row();  // of the thread in a block
  int offset = row * kHeadDim + 16 * swizzled<kHeadDim>(chunk / 2, row) + 8 * (chunk % 2);
  TileWriter writer{s, reinterpret_cast<uint8_t*>(k8)};
  int count = 0;
#pragma unroll 1
  for (int block = last - 1; block >= first; --block, ++count) {
    KTile next;
    if (!in.vectors) tile.load(in, block * kBlock + row);
    if (in.vectors && block > first) next.load(in, (block - 1) * kBlock + row);

    Extrema<4> extrema = extrema_of(tile);
    uint32_t amax_bits = warp_magnitude(extrema, shift);
    int rows_left = in.rows - block * kBlock;
    SpecialRows special;
    uint32_t bad = 0;
    bool has_special = rows_left < kBlock || amax_bits >= 0x7f800000u;
    if (has_special) {
      find_special_rows(extrema, tile, rows_left - row, special, bad);
      amax_bits = warp_magnitude(extrema, shift);
      if (bad != 0 && lane == 0) atomicOr(s.bad_keys, 1);
    }
    if (lane == 0) {
      s.k_amax[count & 1][warp] = amax_bits;
      s.k_bad[count & 1][warp] = bad;
    }
    uint8_t* out = writer.exchange(count, block);

    auto group_amax = [&](int group) {
      return __uint_as_float(max(s.k_amax[count & 1][group], s.k_amax[count & 1][group + kKGroups]));
    };
    if (threadIdx.x < kKGroups) {
      float group = group_amax(threadIdx.x);
      k_scale[block * kKGroups + threadIdx.x] = group < kTiny ? 1.0f : group * (1.0f / 127.0f);
      k_bad[block * kKGroups + threadIdx.x] =
          s.k_bad[count & 1][threadIdx.x] | s.k_bad[count & 1][threadIdx.x + kKGroups] << 16;
    }
    float group = group_amax(warp % kKGroups);
    float inverse = group < kTiny ? 0.0f : 127.0f / group;

    const int squares = has_special ? write_k_rows<true>(out, offset, tile, shift, inverse, special)
                                    : write_k_rows<false>(out, offset, tile, shift, inverse, special);
    if constexpr (kBounded) norm = fmaxf(norm, sqrtf(static_cast<float>(squares)) * (group * (1.0f / 127.0f)));
    fence_async_shared();
    tile = next;
  }
  if constexpr (kBounded) {
    norm = norm_bound(norm);
    if (lane == 0) atomicMax(&s.norm, __float_as_uint(norm));
  }
  writer.finish(count, first);
}

constexpr float kNothing = 1e-20f;  // of V, beside the channel's unit
// By how much the largest scale of a group's pairs may exceed their root mean square in an even tile.
constexpr float kEvenSpread = 1.6f;

// Of the pairs of channels of this thread's group, whose largest values are `largest`: whether they may share one of
// them, which is returned in `shared`. All lanes of the group agree.
__device__ __forceinline__ bool is_even(const float (&largest)[kVWords], float& shared) {
  constexpr int kLanes = 32 / kVGroups;
  shared = largest[0];
#pragma unroll
  for (int i = 1; i < kVWords; ++i) shared = fmaxf(shared, largest[i]);
#pragma unroll
  for (int i = 1; i < kLanes; i *= 2) shared = fmaxf(shared, __shfl_xor_sync(~0u, shared, i));
  if (shared < kNothing) return true;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVWords; ++i) {
    const float part = largest[i] < kNothing ? 1.0f : largest[i] / shared;
    sum = fmaf(part, part, sum);
  }
#pragma unroll
  for (int i = 1; i < kLanes; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
  return sum * (kEvenSpread * kEvenSpread) >= kLanes * kVWords;
}

// Scales of the pairs of channels of this thread for the keys of this tile; returns what brings each channel to
// integers in place of the magnitudes.
__device__ __forceinline__ void scale_block(Shared& s, int turn, int block, float (&amax)[kVChannels],
                                            VScaleType* scale) {
  int channel = kVChannels * (threadIdx.x % 32);
#pragma unroll
  for (int e = 0; e < kVChannels; ++e) amax[e] = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) amax[e] = fmaxf(amax[e], s.v_amax[turn][warp][channel + e]);
  }
  float largest[kVWords], shared;
#pragma unroll
  for (int i = 0; i < kVWords; ++i) {
    const float* unit = &s.inverse[channel + 2 * i];
    largest[i] = fmaxf(amax[2 * i] / unit[0], amax[2 * i + 1] / unit[1]);
  }
  const bool even = __all_sync(~0u, is_even(largest, shared));
#pragma unroll
  for (int i = 0; i < kVWords; ++i) {
    if (even) largest[i] = shared;
    const bool zero = largest[i] < kNothing;
    const float step = __uint_as_float(bf16_above(zero ? 1.0f : largest[i] * (1.0f / 127.0f)) << 16);
#pragma unroll
    for (int e = 2 * i; e < 2 * i + 2; ++e) {
      amax[e] = zero ? 0.0f : 1.0f / (step * s.inverse[channel + e]);
      if (block % 2 != 0) amax[e] = -amax[e];
    }
    const uint32_t bits = __float_as_uint(even ? step * kVLift : step * -kVLift) >> 16;
    const int pair = channel / 2 + i;
    if (threadIdx.x < 32) {
      scale[pair % 4 * (kHeadDim / 8) + scale_place(kHeadDim, pair / 4)] = static_cast<VScaleType>(bits);
    }
  }
}

// Quantizes blocks [first, last) of a head, whose last tile is loaded (vectors only: slow loads are not kept in
// flight).
__device__ __forceinline__ void quantize_v(Shared& s, const Input& in, VTile& tile, int first, int last, VOut* v8,
                                           VScaleType* block_scale) {
  TileWriter writer{s, reinterpret_cast<uint8_t*>(v8)};
  int count = 0;
#pragma unroll 1
  for (int block = last - 1; block >= first; --block, ++count) {
    VTile next;
    int lane = threadIdx.x % 32, first_row = VTile::first_row();
    forget(lane), forget(first_row);               // what follows from them would take registers over all tiles
    float shift[kVChannels], inverse[kVChannels];  // read for each tile: registers are short
#pragma unroll
    for (int e = 0; e < kVChannels; ++e) {
      shift[e] = s.shift[kVChannels * lane + e];
      if constexpr (!kInt8V) inverse[e] = s.inverse[kVChannels * lane + e];
    }
    int key = block * kBlock + first_row;
    forget(key);
    if (!in.vectors) tile.load(in, key);
    if (in.vectors && block > first) next.load(in, key - kBlock);
    int rows_left = in.rows - block * kBlock;
    bool check = s.head_nonfinite != 0 || rows_left < kBlock;
    if constexpr (kInt8V) {
      float amax[kVChannels];
      if (check) {
        channel_amax<true>(amax, tile, shift, rows_left - first_row);
      } else {
        channel_amax<false>(amax, tile, shift, 16);
      }
#pragma unroll
      for (int e = 0; e < kVChannels; ++e) s.v_amax[count & 1][threadIdx.x / 32][kVChannels * lane + e] = amax[e];
    }
    uint8_t* out = writer.exchange(count, block);
    if constexpr (kInt8V) {
      scale_block(s, count & 1, block, inverse, block_scale + static_cast<int64_t>(block) * (kHeadDim / 2));
#pragma unroll
      for (int e = 0; e < kVChannels; ++e) shift[e] = s.shift[kVChannels * lane + e];  // again: registers are short
    }
    constexpr uint32_t kFlip = kInt8V ? kVRaise * 0x01010101u : 0;  // of bytes the same as adding it
    if (check) {
      write_v_tile<true, kFlip>(out, tile, shift, inverse, rows_left - first_row);
    } else {
      write_v_tile<false, kFlip>(out, tile, shift, inverse, 16);
    }
    fence_async_shared();
    tile = next;
  }
  writer.finish(count, first);
}

// ---- Jobs ----

struct Params {
  int8_t* K8;
  float* KScale;
  int* KBad;
  float *KShift, *KNorm;
  VOut* V8;
  VScaleType* VScale;
  float* VMean;
  int *VFirst, *HeadFlags;
  int smooth_k, copy_v, v_stats;
};
constexpr int kFoundHere = 1, kFoundLater = 2;  // v_stats: who finds where 16-bit V is not finite, if anyone asks

// The part of a job that falls to this block.
struct Task {
  int bh, rank, ranks, blocks;  // blocks: of the head
  int first, last;              // key blocks [first, last)
};

// Of V that is not finite attention finds where (attention.cu): nothing is found yet.
__device__ __forceinline__ void clear_findings(const Params& p, int bh) {
  if (threadIdx.x == 0) p.HeadFlags[2 * bh + 1] = 0;
  for (int i = threadIdx.x; i < 2 * kHeadDim; i += kThreads)
    p.VFirst[2 * static_cast<int64_t>(bh) * kHeadDim + i] = kNever;
}

__device__ __forceinline__ void run_k(Shared& s, const Params& p, const Input& in, const Task& t) {
  const Sample sample(in.rows);
  KTile tile;
  if (in.vectors && t.first < t.last) tile.load(in, (t.last - 1) * kBlock + KTile::first_row());
  sample_sums<kSampleLoads>(s, in, sample, sample.begin(t.rank, t.ranks), sample.begin(t.rank + 1, t.ranks));
  if (threadIdx.x == 0) {
    s.bad_keys = p.HeadFlags + 2 * t.bh;
    if (t.rank == 0) *s.bad_keys = 0;  // the cluster's blocks set it behind the barrier
  }
  if (p.v_stats == kFoundLater && t.rank == 0) clear_findings(p, t.bh);
  cluster_arrive();
  cluster_wait();
  int channel = threadIdx.x;
  if (channel < kHeadDim) {
    float shift = reduce_cluster<kSum>(s, channel) / static_cast<float>(sample.count);
    if (p.smooth_k == 0 || !(fabsf(shift) < kShiftMax)) shift = 0.0f;
    s.shift[channel] = shift;
    if (t.rank == 0) p.KShift[static_cast<int64_t>(t.bh) * kHeadDim + channel] = shift;
  }
  __syncthreads();
  cluster_arrive_relaxed();  // no block ends while another may read its statistics
  if (t.first < t.last) {
    int64_t blocks_before = static_cast<int64_t>(t.bh) * t.blocks;
    quantize_k(s, in, tile, t.first, t.last, p.K8 + blocks_before * kTileBytes, p.KScale + blocks_before * kKGroups,
               p.KBad + blocks_before * kKGroups);
  }
  if (kBounded && threadIdx.x == 0) {
    write_norm(p.KNorm + static_cast<int64_t>(t.bh) * kNormSlots, __uint_as_float(s.norm), t.rank, t.ranks);
  }
  cluster_wait();
}

// What the largest magnitude of a channel of V becomes in e4m3, `square` being the mean of its squares: e4m3's largest
// value less the power of two that leaves a root mean square of 1 to 2, for sums in fp16 (half_sums.cuh).
__device__ __forceinline__ float v_largest(float amax, float square) {
  const float ratio = amax / (224.0f * sqrtf(fmaxf(square, 0.0f)));
  const float power = __uint_as_float(__float_as_uint(fmaxf(ratio, 0x1p-8f)) & 0x7f800000u);
  return 448.0f * fminf(power, 1.0f);
}

// Shift and inverse scale of one channel of V, in s; rank 0 writes what attention needs.
__device__ __forceinline__ void finish_v_channel(Shared& s, const Params& p, const Task& t, int rows, int channel,
                                                 bool nonfinite) {
  int64_t at = static_cast<int64_t>(t.bh) * kHeadDim + channel;
  if (t.rank == 0) {
    int64_t first = 2 * static_cast<int64_t>(t.bh) * kHeadDim + channel;
    p.VFirst[first] = nonfinite ? reduce_first(s, 0, channel) : kNever;
    p.VFirst[first + kHeadDim] = nonfinite ? reduce_first(s, 1, channel) : kNever;
  }
  if constexpr (kQuantizedV) {
    float count = static_cast<float>(rows);
    float mean = reduce_cluster<kSum>(s, channel) / count;
    float square = reduce_cluster<kSquares>(s, channel) / count;
    const float shift = v_shift(mean, square);
    float* place = p.VMean + static_cast<int64_t>(t.bh) * mean_words(kHeadDim) + channel;
    if constexpr (kInt8V) {
      const float unit = v_unit(mean, square, shift);
      s.inverse[channel] = unit;
      if (t.rank == 0) place[kHeadDim] = unit;
    }
    mean = shift;
    s.shift[channel] = mean;
    if (t.rank == 0) *place = mean;
    if constexpr (!kInt8V) {
      float amax = fmaxf(reduce_cluster<kMax>(s, channel) - mean, mean - reduce_cluster<kMin>(s, channel));
      bool zero = !(amax >= kTiny);  // also where nothing is finite
      float largest = v_largest(amax, square - mean * mean);
      s.inverse[channel] = zero ? 0.0f : largest / amax;
      if (t.rank == 0) p.VScale[at] = zero ? 1.0f : amax / largest;
    }
  }
}

// V of the leading keys less its mean, in the channels' units, in 16 bits; infinities and NaN count as the mean.
__device__ __forceinline__ void write_leading(const Shared& s, const Params& p, const Input& in, int bh) {
  constexpr int kWords = kHeadDim / 2;
  if (threadIdx.x >= kLeadingKeys * kWords) return;
  const int channel = 2 * (threadIdx.x % kWords);
  uint32_t x[1][1];
  load_rows(x, in, threadIdx.x / kWords, 1, channel);
  auto in_units = [&](float v, int d) { return is_finite(v) ? (v - s.shift[d]) / s.inverse[d] : 0.0f; };
  uint32_t* place = reinterpret_cast<uint32_t*>(p.VMean + static_cast<int64_t>(bh) * mean_words(kHeadDim));
  place[leading_at(kHeadDim) + threadIdx.x] =
      to_io2(in_units(low_io(x[0][0]), channel), in_units(high_io(x[0][0]), channel + 1));
}

__device__ __forceinline__ void run_v(Shared& s, const Params& p, const Input& in, const Task& t) {
  if (kQuantizedV || p.v_stats == kFoundHere) {
    column_statistics<kVStats, kVLoadsAtATime>(s, in, t.first * kBlock, min(t.last * kBlock, in.rows));
    VTile tile;
    if (kQuantizedV && in.vectors && t.first < t.last) tile.load(in, (t.last - 1) * kBlock + VTile::first_row());
    cluster_arrive();
    cluster_wait();
    bool nonfinite = any_nonfinite(s);
    if (threadIdx.x < kHeadDim) finish_v_channel(s, p, t, in.rows, threadIdx.x, nonfinite);
    if (threadIdx.x == 0) {
      s.head_nonfinite = nonfinite;
      if (t.rank == 0) p.HeadFlags[2 * t.bh + 1] = nonfinite;
    }
    __syncthreads();
    cluster_arrive_relaxed();  // no block ends while another may read its statistics
    if (kLeadingKeys != 0 && t.rank == 0) write_leading(s, p, in, t.bh);
    if constexpr (kQuantizedV) {
      if (t.first < t.last) {
        int64_t blocks_before = static_cast<int64_t>(t.bh) * t.blocks;
        quantize_v(s, in, tile, t.first, t.last, p.V8 + blocks_before * kTileBytes,
                   p.VScale + (kInt8V ? blocks_before * (kHeadDim / 2) : 0));
      }
    }
  }
  if constexpr (!kQuantizedV) {
    if (p.copy_v != 0) {
      copy_rows(in, t.first * kBlock, t.last * kBlock, p.V8 + static_cast<int64_t>(t.bh) * t.blocks * kTileBytes);
    }
  }
  if (kQuantizedV || p.v_stats == kFoundHere) cluster_wait();
}

}  // namespace sagert

// Grid: one cluster of at most CLUSTER blocks per job; B * Hk jobs, twice as many with v_jobs.
extern "C" __global__ void __launch_bounds__(sagert::kThreads, BLOCKS_PER_SM)
    quantize_kv(const uint16_t* K, const uint16_t* V, int8_t* K8, float* KScale, int* KBad, float* KShift, float* KNorm,
                sagert::VOut* V8, sagert::VScaleType* VScale, float* VMean, int* VFirst, int* HeadFlags, int seqlen_k,
                int blocks, int heads_kv, int head_dim, int head_dim_v, int smooth_k, int v_jobs, int copy_v,
                int v_stats, int64_t k_sb, int64_t k_sh, int64_t k_ss, int64_t k_sd, int64_t v_sb, int64_t v_sh,
                int64_t v_ss, int64_t v_sd, int k_vec, int v_vec, int* NextTile) {
  using namespace sagert;
  __shared__ Shared s;
  // What is in front of this launch may have written the inputs, or still read the workspace. Attention starts behind
  // that wait: it reads queries before its own.
  wait_for_prerequisites();
  launch_dependents();

  const int cluster = static_cast<int>(cluster_size());
  int job = blockIdx.x / cluster;
  bool is_v = v_jobs != 0 && job % 2 == 1;
  if (threadIdx.x == 0) {
    s.channel_stride = is_v ? v_sd : k_sd;
    s.norm = 0;
    if (NextTile != nullptr && blockIdx.x == 0) *NextTile = 0;
  }
  __syncthreads();
  Task t;
  t.bh = v_jobs != 0 ? job / 2 : job;
  t.rank = blockIdx.x % cluster;
  t.ranks = cluster;
  t.blocks = blocks;
  t.first = static_cast<int>(static_cast<int64_t>(blocks) * t.rank / cluster);
  t.last = static_cast<int>(static_cast<int64_t>(blocks) * (t.rank + 1) / cluster);
  int64_t b = t.bh / heads_kv, h = t.bh % heads_kv;
  Params p{K8, KScale, KBad, KShift, KNorm, V8, VScale, VMean, VFirst, HeadFlags, smooth_k, copy_v, v_stats};
  if (is_v) {
    Input in{V + b * v_sb + h * v_sh, v_ss, &s.channel_stride, seqlen_k, head_dim_v, v_vec != 0};
    run_v(s, p, in, t);
  } else {
    Input in{K + b * k_sb + h * k_sh, k_ss, &s.channel_stride, seqlen_k, head_dim, k_vec != 0};
    run_k(s, p, in, t);
  }
}
