// SPDX-License-Identifier: Apache-2.0
// Pre-pass of the mma family for queries in INT4: means of blocks of queries, which attention takes off before it
// quantizes, and the means' products with K, which it adds back (SageAttention2, arXiv 2411.10958). The means are
// rounded to the inputs' type first: what is taken off is what comes back.
//
// A thread block has 16 blocks of queries of a head, the rows of a fragment, and goes through the head's keys.
#include "integers.cuh"
#include "ptx/mma.cuh"
#include "ptx/numeric.cuh"
#include "quantize.cuh"

namespace sagert {
using namespace ptx;

constexpr int kHeadDim = stored_channels(HEAD_DIM);
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMeans = 16;               // blocks of queries
constexpr int kVectors = kHeadDim / 32;  // of 8 channels, that a lane has of a row
constexpr int kLaneChannels = kHeadDim / 32;
constexpr float kMeanMax = 1.0e30f;  // no larger mean is taken off: the difference must stay finite

struct alignas(16) Shared {
  uint16_t mean[kMeans][kHeadDim];
  float shift[kMeans];  // the means' products with K's shift
};

// Rows of Q or K of one head, of any strides; zeros beyond them.
struct Rows {
  const uint16_t* base;
  int64_t row_stride, channel_stride;
  int rows, channels;
  bool vectors;  // rows are contiguous and 16-byte aligned, channels a multiple of 8

  __device__ __forceinline__ uint16_t at(int row, int channel) const {
    return row < rows && channel < channels ? base[row * row_stride + channel * channel_stride] : uint16_t{0};
  }
  // 8 channels.
  __device__ __forceinline__ uint4 load(int row, int channel) const {
    if (vectors) {
      if (row >= rows || channel >= channels) return make_uint4(0, 0, 0, 0);
      return *reinterpret_cast<const uint4*>(base + row * row_stride + channel);
    }
    auto pair = [&](int i) { return at(row, channel + i) | static_cast<uint32_t>(at(row, channel + i + 1)) << 16; };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
  }
};

// Mean of the finite queries of block `block`, by a warp; a lane's channels are lane + 32 i.
__device__ __forceinline__ void average(Shared& s, const Rows& q, int block, int block_rows, int index) {
  const int lane = threadIdx.x % 32, first = block * block_rows, end = min(first + block_rows, q.rows);
  float sum[kLaneChannels] = {};
#pragma unroll 4
  for (int row = first; row < end; ++row) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const float x = low_io(q.at(row, lane + 32 * i));
      sum[i] += fabsf(x) < infinity() ? x : 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const float mean = first < end ? sum[i] / static_cast<float>(end - first) : 0.f;
    s.mean[index][lane + 32 * i] = static_cast<uint16_t>(to_io2(fabsf(mean) < kMeanMax ? mean : 0.f, 0.f));
  }
}

__device__ __forceinline__ float shift_product(const Shared& s, const float* shift, int index) {
  float product = 0.f;
  for (int d = threadIdx.x % 32; d < kHeadDim; d += 32) product = fmaf(low_io(s.mean[index][d]), shift[d], product);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) product += __shfl_xor_sync(~0u, product, step);
  return product;
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if SAGERT_IO_BF16
  mma_bf16(d, a, b0, b1, d);
#else
  mma_f16(d, a, b0, b1, d);
#endif
}

}  // namespace sagert

// Grid: ceil(q_blocks / 16) * B * H. QMean [B * H, q_blocks, D], 0 in heads whose K is not finite, Bias [B * H,
// q_blocks, blocks * 64] in the unit of the exponent, 0 where a key is absent or not finite.
extern "C" __global__ void __launch_bounds__(sagert::kThreads, 1)
    smooth_q(const uint16_t* Q, const uint16_t* K, const float* KShift, const int* HeadFlags, uint16_t* QMean,
             float* Bias, float scale_log2, int seqlen_q, int seqlen_k, int blocks, int heads_q, int group,
             int head_dim, int q_blocks, int q_block_rows, int64_t q_sb, int64_t q_sh, int64_t q_ss, int64_t q_sd,
             int64_t k_sb, int64_t k_sh, int64_t k_ss, int64_t k_sd, int q_vec, int k_vec) {
  using namespace sagert;
  __shared__ Shared s;
  const int parts = (q_blocks + kMeans - 1) / kMeans;
  const int head = blockIdx.x / parts, first = blockIdx.x % parts * kMeans;
  const int b = head / heads_q, h = head % heads_q, h_kv = h / group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  // Beside infinities in K nothing is taken off: a score's sign is to be that of the query's own value.
  const bool k_bad = HeadFlags[head / group * 2] != 0;
  const Rows q = {Q + b * q_sb + h * q_sh, q_ss, q_sd, k_bad ? 0 : seqlen_q, head_dim, q_vec != 0};
  const Rows k = {K + b * k_sb + h_kv * k_sh, k_ss, k_sd, seqlen_k, head_dim, k_vec != 0};
  const float* shift = KShift + static_cast<int64_t>(head / group) * kHeadDim;
  for (int i = warp; i < kMeans; i += kWarps) {
    average(s, q, first + i, q_block_rows, i);
    __syncwarp();
    const float product = shift_product(s, shift, i);
    if (lane == 0) s.shift[i] = product;
  }
  __syncthreads();
  const int64_t place = static_cast<int64_t>(head) * q_blocks + first;
  const int found = min(q_blocks - first, kMeans);
  for (int i = threadIdx.x; i < found * kHeadDim; i += kThreads) {
    QMean[place * kHeadDim + i] = s.mean[i / kHeadDim][i % kHeadDim];
  }
  // Channels are summed over: any order will do that both operands have. A lane takes 8 neighbours at a time.
  uint32_t means[kVectors][2][4];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint4 low = *reinterpret_cast<const uint4*>(&s.mean[lane / 4][32 * i + 8 * quad]);
    const uint4 high = *reinterpret_cast<const uint4*>(&s.mean[lane / 4 + 8][32 * i + 8 * quad]);
    means[i][0][0] = low.x, means[i][0][1] = high.x, means[i][0][2] = low.y, means[i][0][3] = high.y;
    means[i][1][0] = low.z, means[i][1][1] = high.z, means[i][1][2] = low.w, means[i][1][3] = high.w;
  }
  const int keys = blocks * 64;
  for (int key = 8 * warp; key < keys; key += 8 * kWarps) {
    float products[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 x = k.load(key + lane / 4, 32 * i + 8 * quad);
      multiply(products, means[i][0], x.x, x.y);
      multiply(products, means[i][1], x.z, x.w);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      auto bias = [&](int i) {
        const float x = (products[2 * half + i] - s.shift[row]) * scale_log2;
        return key + 2 * quad + i < seqlen_k && fabsf(x) < infinity() ? x : 0.f;
      };
      if (row < found) {
        *reinterpret_cast<float2*>(Bias + (place + row) * keys + key + 2 * quad) = make_float2(bias(0), bias(1));
      }
    }
  }
}
