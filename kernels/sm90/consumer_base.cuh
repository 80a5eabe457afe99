// SPDX-License-Identifier: Apache-2.0
// What the consumers share: which scores are a thread's, rings of K and V, masks, row maxima, and the epilogue.
#pragma once

#include "ptx/named_barrier.cuh"
#include "ptx/wgmma.cuh"
#include "queries.cuh"
#include "tile.cuh"

namespace sagert {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.402823466e38f;  // of a row that has seen no key
constexpr int kMasked = -2147483647 - 1;     // score of a key that a query does not see

struct ConsumerBase {
  using Scores = int32_t[kBlock / 2];

  const Params& p;
  Shared& s;
  Ring<kStages> k;  // the blocks that come next
  Ring<kStagesV> v;
  uint64_t q_descriptor;
  const float* k_scales;
  float l[2];  // sums of the exponentials
  float o[kHeadDim / 2];

  __device__ __forceinline__ ConsumerBase(const Params& params, Shared& shared) : p(params), s(shared) {}

  // Columns 8 j + 2 quad + {0, 1} and rows row + {0, 8} of the tile are this thread's.
  static __device__ __forceinline__ int quad() { return threadIdx.x % 4; }
  static __device__ __forceinline__ int row() { return (threadIdx.x - 128) / 32 * 16 + threadIdx.x % 32 / 4; }
  // A value that all lanes have, in a register that all lanes share.
  static __device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_max_sync(~0u, value); }
  static __device__ __forceinline__ int warpgroup() { return uniform(threadIdx.x / 128) - 1; }
  static __device__ __forceinline__ bool leader() { return threadIdx.x % 32 == 0; }

  __device__ __forceinline__ uint32_t full_k() { return shared_address(&s.full_k[k.stage]); }
  __device__ __forceinline__ uint32_t full_v() { return shared_address(&s.full_v[v.stage]); }
  __device__ __forceinline__ bool k_ready() { return mbarrier_try(full_k(), k.parity); }
  __device__ __forceinline__ bool v_ready() { return mbarrier_try(full_v(), v.parity); }
  // Scale of this thread's keys of the next block, counting down.
  __device__ __forceinline__ float next_k_scale() {
    float scale = __ldg(k_scales);
    k_scales -= 4;
    return scale;
  }

  __device__ __forceinline__ void issue_qk(Scores& scores, bool ready) {
    if (!ready) mbarrier_wait(full_k(), k.parity);
    uint64_t b = descriptor<kHeadDim>(shared_address(s.k[k.stage]));
    wgmma_fence();
    wgmma_s8<0>(scores, q_descriptor, b);
#pragma unroll
    for (int i = 1; i < kHeadDim / 32; ++i) wgmma_s8<1>(scores, q_descriptor + 2 * i, b + 2 * i);
    wgmma_commit();
  }

  __device__ __forceinline__ void release_k() {
    if (leader()) mbarrier_arrive(shared_address(&s.empty_k[k.stage]));
    k.advance();
  }

  __device__ __forceinline__ void release_v() {
    if (leader()) mbarrier_arrive(shared_address(&s.empty_v[v.stage]));
    v.advance();
  }

  // A block that the other warpgroups see.
  __device__ __forceinline__ void skip_block() {
    mbarrier_wait(full_k(), k.parity);
    release_k();
    k_scales -= 4;
    mbarrier_wait(full_v(), v.parity);
    release_v();
  }

#if V8_I8
  // l is the sum of bytes, which is what P V multiplied; the LSE is of the exponentials before they were rounded. Their
  // sum is this thread's alone, but the products leave no register for it.
  __device__ __forceinline__ float& exact_sum(int r) { return s.exact_sums[r][threadIdx.x - 128]; }
#else
  __device__ __forceinline__ float exact_sum(int r) { return l[r]; }
#endif
  __device__ __forceinline__ bool wants_lse() { return p.write_lse || is_split(); }

  // Brings O, to which all blocks before have been added, to the present maximum.
  __device__ __forceinline__ void rescale(const float (&alpha)[2]) {
    if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= alpha[i / 2 % 2];
    }
  }

  // Bit 2 j + e: key 8 j + 2 quad + e of a block, for this thread's quad, lies at `limit` or behind it.
  static __device__ __forceinline__ uint32_t beyond(int limit) {
    auto below = [&](int e) {  // how many j have their key before the limit
      return min(max((limit - 2 * quad() - e + 7) >> 3, 0), kBlock / 8);
    };
    uint64_t even = (uint64_t{1} << 2 * below(0)) - 1, odd = (uint64_t{1} << 2 * below(1)) - 1;
    return ~(static_cast<uint32_t>(even) & 0x55555555u | static_cast<uint32_t>(odd) & 0xaaaaaaaau);
  }

  // Largest of this thread's integer scores of row r.
  static __device__ __forceinline__ int row_top(const Scores& scores, int r) {
    int top[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int* x = scores + 32 * half + 2 * r;
      top[half] = max(x[0], x[1]);
#pragma unroll
      for (int i = 4; i < 32; i += 4) top[half] = max(max(top[half], x[i]), x[i + 1]);
    }
    return max(top[0], top[1]);
  }

  // The four threads of a row.
  static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }

  static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }

  // This thread's keys of a block that hold an infinity or a NaN, bits as in beyond().
  __device__ __forceinline__ uint32_t bad_keys(const Tile& tile, int block, bool k_bad) {
    return k_bad ? p.k_bad[(static_cast<int64_t>(tile.head / p.group) * p.blocks + block) * 4 + quad()] : 0;
  }

  // Masks row r of a block that holds the end of the keys, the causal diagonal, or bad keys; returns the row's largest
  // score, kMasked when there is none. The score of a visible bad key is -inf, or +inf or NaN: that ends the row.
  __device__ __forceinline__ int mask_row(Scores& scores, int r, const Tile& tile, int block, uint32_t bad,
                                          bool& undefined) {
    int limit = p.seqlen_k - block * kBlock;
    if constexpr (kCausal) {
      int mine = row();
      forget(mine);  // the limit would take a register over all blocks
      limit = min(limit, tile.row + mine + 8 * r + 1 - block * kBlock);
    }
    const uint32_t hidden = beyond(limit);
    undefined = false;
    int top = kMasked;
#pragma unroll
    for (int n = 0; n < kBlock / 4; ++n) {
      int& x = scores[n / 2 * 4 + 2 * r + n % 2];
      if (bad >> n & ~hidden >> n & 1) undefined = undefined || x >= 0;
      if ((hidden | bad) >> n & 1) x = kMasked;
      top = max(top, x);
    }
    pin(scores);  // keeps the compiler from spreading the two rows over more registers than there are
    return top;
  }

  // Brings the visible scores of row r to a coarser scale.
  static __device__ __forceinline__ void coarsen_row(Scores& scores, int r, float ratio) {
#pragma unroll
    for (int n = 0; n < kBlock / 4; ++n) {
      int& x = scores[n / 2 * 4 + 2 * r + n % 2];
      if (x != kMasked) x = __float2int_rn(static_cast<float>(x) * ratio);
    }
  }

  // The head's K (0) or V (1) holds an infinity or a NaN. Without a mask nobody asks where 16-bit V is not finite, and
  // the pre-pass does not say.
  __device__ __forceinline__ bool is_bad(const Tile& tile, int which) {
    if (kV == V::kIo && !kCausal && which == 1) return false;
    return __ldg(p.head_flags + tile.head / p.group * 2 + which) != 0;
  }

  // Starts to copy the queries of a tile to where the ones before have been read.
  __device__ __forceinline__ void prefetch(int index) {
    if (p.q_vec && index < p.tiles * p.heads_total) prefetch_queries(p, s, tile_at(p, index), row(), quad());
  }

  __device__ __forceinline__ void quantize_queries(const Tile& tile) {
    const float* shift = p.write_lse ? p.k_shift + static_cast<int64_t>(tile.head / p.group) * kHeadDim : nullptr;
    auto keep = [&](int r, const QuantizedRow& quantized) {
      s.q_scale[r] = quantized.scale;
      s.q_shift[r] = quantized.shift;
    };
    if (p.q_vec) {
#pragma unroll
      for (int n = 0; n < 2; ++n) keep(row() + 8 * n, quantize_row(p, s, row() + 8 * n, quad(), shift));
    } else {
#pragma unroll 1
      for (int r = row(); r < row() + 16; r += 8) {
        const bool inside = tile.row + r < p.seqlen_q;
        keep(r, quantize_row_any(p, s, r, quad(), queries_of(p, tile) + r * p.q_ss, inside, shift));
      }
    }
  }

  __device__ __forceinline__ void begin(const Tile& tile, int index) {
    const int barrier = threadIdx.x / 128;
    named_barrier(barrier, 128);  // nobody reads the queries before any more
    async_copy_wait();
    quantize_queries(tile);
    prefetch(index + gridDim.x);
    fence_async_shared();
    named_barrier(barrier, 128);
    q_descriptor =
        descriptor<kHeadDim>(shared_address(&s.q[(kV == V::kInt8 ? row() / 64 : warpgroup()) * 64 * kHeadDim]));
    k_scales = p.k_scale + (static_cast<int64_t>(tile.head / p.group) * p.blocks + tile.end - 1) * 4 + quad();
    l[0] = l[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
  }

  // The end of the blocks that this warpgroup's queries see, were there no parts.
  __device__ __forceinline__ int end_of_keys(const Tile& tile) {
    const int last = tile.row + warpgroup() * 64 + 63;  // query
    return kCausal ? min(p.blocks, last / kBlock + 1) : p.blocks;
  }

  // The end of those in this part; none are left for queries behind the last one.
  __device__ __forceinline__ int end_of_warpgroup(const Tile& tile) {
    if (tile.row + warpgroup() * 64 >= p.seqlen_q) return tile.begin;
    return max(min(tile.end, end_of_keys(tile)), tile.begin);
  }

  // How many of the blocks up to `end` need masks; they come first.
  __device__ __forceinline__ int masked_blocks(const Tile& tile, int end, bool k_bad) {
    const bool ragged = kCausal ? end == end_of_keys(tile) : end * kBlock > p.seqlen_k;
    return k_bad ? end - tile.begin : ragged ? 1 : 0;
  }

  // `maximum` of each row, which l and O refer to.
  __device__ __forceinline__ void write(int index, const float (&maximum)[2]) {
    // Worked out anew: it would take registers in the loop over the keys.
    forget(index);
    const Tile tile = tile_at(p, index);
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] = quad_sum(l[r]);
      const float sum = kV == V::kInt8 && wants_lse() ? quad_sum(exact_sum(r)) : l[r];
      inverse[r] = p.seqlen_k == 0 ? 0.f : 1.f / l[r];
      const int query = tile.row + row() + 8 * r;
      if (quad() == 0 && query < p.seqlen_q) {
        const int64_t place = static_cast<int64_t>(tile.head) * p.seqlen_q + query;
        const float lse = __log2f(sum) + maximum[r], shift = s.q_shift[row() + 8 * r];
        if (is_split()) {
          write_part_lse(place, lse, shift);
        } else if (p.write_lse) {
          p.lse[place] = kLn2 * (lse + shift);
        }
      }
    }
    const int64_t channels = static_cast<int64_t>(tile.head / p.group) * kHeadDim + 2 * quad();
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      float2 scale = {1.f, 1.f}, mean = {0.f, 0.f};  // scales of a block are in O already
      if constexpr (kV == V::kFp8) {
        scale = __ldg(reinterpret_cast<const float2*>(p.v_scale + channels + 8 * j));
      }
      if constexpr (kV != V::kIo) mean = __ldg(reinterpret_cast<const float2*>(p.v_mean + channels + 8 * j));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        o[4 * j + 2 * r] = fmaf(o[4 * j + 2 * r] * inverse[r], scale.x, mean.x);
        o[4 * j + 2 * r + 1] = fmaf(o[4 * j + 2 * r + 1] * inverse[r], scale.y, mean.y);
      }
    }
    if (is_bad(tile, 1)) add_nonfinite(tile);
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
