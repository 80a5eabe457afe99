// SPDX-License-Identifier: Apache-2.0
// What the consumers share: which scores are a thread's, rings of K and V, masks, row maxima, and the epilogue.
#pragma once

#include "leading.cuh"
#include "nonfinite.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/store.cuh"
#include "ptx/wgmma.cuh"
#include "queries.cuh"
#include "queue.cuh"
#include "rows.cuh"
#include "tile.cuh"

namespace sagert {

constexpr int kMasked = -2147483647 - 1;  // score of a key that a query does not see

struct ConsumerBase {
  using Scores = int32_t[kStep / 2];  // the whole block's first

  const Params& p;
  Shared& s;
  Ring<kStages> ring;                        // the step that comes next
  uint64_t q_operand, k_operand, v_operand;  // wgmma's descriptors of Q and of the first stages
  const float* k_scales;                     // of the next block; unless kSide
  int turn;                                  // which tile of this thread block, counted from 0; unless kHalfSums
  float l[2];                                // sums of P
  float o[kHeadDim / 2 + kOnes / 2];

  __device__ __forceinline__ ConsumerBase(const Params& params, Shared& shared) : p(params), s(shared) {
    k_operand = uniform_operand(descriptor<kHeadDim>(shared_address(s.k[0])));
    const uint32_t v_first = shared_address(s.v[0]);
    v_operand = uniform_operand(kV == V::kIo ? descriptor_io(v_first) : descriptor<kBlock>(v_first));
  }

  // Columns 8 j + 2 quad + {0, 1} and rows row + {0, 8} of the tile are this thread's.
  static __device__ __forceinline__ int quad() { return thread_index() % 4; }
  static __device__ __forceinline__ int row() {
    const uint32_t thread = thread_index();
    return (thread - 128) / 32 * 16 + thread % 32 / 4;
  }
  static __device__ __forceinline__ int warpgroup() { return uniform(threadIdx.x / 128) - 1; }
  // Of FP8 the upper word, too: as the constant that it is it would be moved to its place anew for every wgmma. With
  // other types of V the compiler makes worse code of that.
  static __device__ __forceinline__ uint64_t uniform_operand(uint64_t descriptor) {
    uint32_t upper = static_cast<uint32_t>(descriptor >> 32);
    if constexpr (kV == V::kFp8) upper = uniform(upper);
    return static_cast<uint64_t>(upper) << 32 | uniform(static_cast<uint32_t>(descriptor));
  }

  // K and V of the next step are there.
  __device__ __forceinline__ void wait_for_block() { mbarrier_wait(shared_address(&s.full[ring.stage]), ring.parity); }
  // Scale of this thread's keys of the next block, counting down.
  __device__ __forceinline__ float next_k_scale() {
    float scale = __ldg(k_scales);
    k_scales -= 4;
    return scale;
  }
  // The same of a block, without a pointer that stays.
  __device__ __forceinline__ float k_scale_at(int block) const {
    return __ldg(p.k_scale + (static_cast<int64_t>(task().head_kv) * p.blocks + block) * 4 + quad());
  }

  // Where the scales of this thread's keys of a head's blocks begin: a pointer would take two registers.
  __device__ __forceinline__ uint32_t head_k_scales() const {
    return static_cast<uint32_t>(task().head_kv) * p.blocks * 4 + quad();
  }
  // Those of a step's pieces. The last step may lack a block, but not what is behind the scales in memory: masks see to
  // what that is.
  __device__ __forceinline__ void k_scales_at(uint32_t head, int step, float (&scales)[kPieces]) const {
    const uint32_t side = head + 4 * side_block(step);
    scales[0] = __ldg(p.k_scale + (side + ((step & 1) * 8 - 4)));
    scales[kPieces - 1] = __ldg(p.k_scale + side);
  }

  __device__ __forceinline__ void issue_qk(Scores& scores) {
    wait_for_block();
    const uint64_t b = operand_behind(k_operand, ring.stage * kKStageBytes);
    wgmma_fence();
    wgmma_s8<0>(scores, q_operand, b);
#pragma unroll
    for (int i = 1; i < kHeadDim / 32; ++i) {
      wgmma_s8<1>(scores, operand_behind(q_operand, 32 * i), operand_behind(b, 32 * i));
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void release_block() {
    mbarrier_arrive_once(shared_address(&s.empty[ring.stage]));
    ring.advance();
  }

  // Blocks that the other warpgroups see.
  __device__ __forceinline__ void skip_blocks(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      wait_for_block();
      release_block();
      if constexpr (kSide == 0) k_scales -= 4;
    }
  }

  // Largest of this thread's integer scores of row r in a piece.
  static __device__ __forceinline__ int row_top(const Scores& scores, int r, int piece = 0) {
    int top[2];
#pragma unroll
    for (int half = 0; half < (piece == 0 ? 2 : 1); ++half) {
      const int* x = scores + kBlock / 2 * piece + 32 * half + 2 * r;
      top[half] = max(x[0], x[1]);
#pragma unroll
      for (int i = 4; i < 32; i += 4) top[half] = max(max(top[half], x[i]), x[i + 1]);
    }
    return piece == 0 ? max(top[0], top[1]) : top[0];
  }

  // This thread's keys of a piece that hold an infinity or a NaN: bit 2 j + e stands for key 8 j + 2 quad + e.
  __device__ __forceinline__ uint32_t bad_keys(int step, int piece = 0) {
    const int* bad = task().bad_keys;
    const int block = piece == 0 ? whole_block(step) : side_block(step);
    if (bad == nullptr || (kSide != 0 && block >= p.blocks)) return 0;
    const uint32_t word = __ldg(bad + 4 * block + quad());
    return piece == 0 ? word : word >> (step & 1) * (kSide / 4) & 0xffffu;
  }

  // Masks row r of a step that holds the end of the keys, the causal diagonal, or bad keys, in one of its pieces;
  // returns the row's largest score, kMasked when there is none. The score of a visible bad key is -inf, or +inf or
  // NaN: that ends the row.
  __device__ __forceinline__ int mask_row(Scores& scores, int r, int step, uint32_t bad, bool& undefined,
                                          int piece = 0) {
    const int first = first_key(step, piece), keys = piece == 0 ? kBlock : kSide;
    int* row = scores + kBlock / 2 * piece + 2 * r;
    int limit = p.seqlen_k - first;
    if constexpr (kCausal) limit = min(limit, query(r) + 1 - first);
    limit -= 2 * quad();  // of this thread's keys
#pragma unroll
    for (int n = 0; n < keys / 4; ++n) {
      if (n / 2 * 8 + n % 2 >= limit) row[n / 2 * 4 + n % 2] = kMasked;
    }
    pin(scores);  // keeps the compiler from spreading the two rows over more registers than there are
    undefined = false;
    if (__any_sync(~0u, bad != 0)) {
#pragma unroll
      for (int n = 0; n < keys / 4; ++n) {
        int& x = row[n / 2 * 4 + n % 2];
        if (!(bad >> n & 1)) continue;
        undefined = undefined || x >= 0;
        x = kMasked;
      }
      pin(scores);
    }
    return row_top(scores, r, piece);
  }

  // Brings the visible scores of row r in a piece to a coarser scale.
  static __device__ __forceinline__ void coarsen_row(Scores& scores, int r, float ratio, int piece = 0) {
#pragma unroll
    for (int n = 0; n < (piece == 0 ? kBlock : kSide) / 4; ++n) {
      int& x = scores[kBlock / 2 * piece + n / 2 * 4 + 2 * r + n % 2];
      if (x != kMasked) x = __float2int_rn(static_cast<float>(x) * ratio);
    }
  }

  // What this warpgroup has to do now. It is read where it is used: registers are short.
  __device__ __forceinline__ const Task& task() const {
    const uint32_t thread = thread_index() - 128;
    return s.tasks[thread / 128][kHalfSums ? s.turns[thread] : turn & 1];
  }
  // This thread's query of row r.
  __device__ __forceinline__ int query(int r) const { return task().row + row() % 64 + 8 * r; }

  __device__ __forceinline__ void quantize_queries() {
    const float* shift = p.write_lse ? p.k_shift + static_cast<int64_t>(task().head_kv) * kHeadDim : nullptr;
    auto keep = [&](int r, const QuantizedRow& quantized) {
      s.q_scale[r] = quantized.scale;
      s.q_shift[r] = quantized.shift;
      if constexpr (kBounded) s.q_bound[r] = score_bound(quantized.scale, quantized.squares, task().k_norm);
    };
    if (p.q_vec) {
      QuantizedRow rows[2];
      quantize_rows(p, s, row(), quad(), shift, rows);
#pragma unroll
      for (int n = 0; n < 2; ++n) keep(row() + 8 * n, rows[n]);
    } else {
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const uint16_t* place = queries_of(p, task().head, query(n));
        keep(row() + 8 * n, quantize_row_any(p, s, row() + 8 * n, quad(), place, query(n) < p.seqlen_q, shift));
      }
    }
  }

  // Takes the next tile, if there is one; `next` counts them, unless kHalfSums.
  __device__ __forceinline__ bool begin(int next) {
    const int group = thread_index() / 128 - 1;
    int head;
#pragma unroll 1
    do {
      turn = kHalfSums ? s.turns[thread_index() - 128] ^= 1 : next;
      mbarrier_wait(shared_address(&s.full_q[group]), turn & 1);
      head = static_cast<int>(uniform(task().head));
      if (head == kEnd) return false;
      if (!kHalfSums || head != kEndOfRound) quantize_queries();
      __syncwarp();  // one lane arrives for what all of them have read
      mbarrier_arrive_once(shared_address(&s.empty_q[group]));
    } while (kHalfSums && head == kEndOfRound);
    fence_async_shared();
    named_barrier(group + 1, 128);
    q_operand = uniform_operand(descriptor<kHeadDim>(shared_address(&s.q[group * 64 * kHeadDim])));
    const int last = task().end + task().skipped - 1;  // block
    if (kSide == 0) k_scales = p.k_scale + (static_cast<int64_t>(task().head_kv) * p.blocks + last) * 4 + quad();
    l[0] = l[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2 + kOnes / 2; ++i) o[i] = 0.f;
    return true;
  }

  // Where V's mean of the head stands.
  __device__ __forceinline__ int64_t mean_place() const {
    return static_cast<int64_t>(task().head_kv) * mean_words(kHeadDim);
  }

  // `maximum` of each row, which l and O refer to; `total` is the sum of its exponentials.
  __device__ __forceinline__ void write(const float (&maximum)[2], const float (&total)[2]) {
    named_barrier(warpgroup() + 1, 128);  // nobody reads the queries any more
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      inverse[r] = p.seqlen_k == 0 ? 0.f : reciprocal_approx(l[r]);
      if ((is_split() || p.write_lse) && quad() == 0 && query(r) < p.seqlen_q) {
        const int64_t place = static_cast<int64_t>(task().head) * p.seqlen_q + query(r);
        const float lse = __log2f(total[r]) + maximum[r], shift = s.q_shift[row() + 8 * r];
        if (is_split()) {
          write_part_lse(place, __log2f(l[r]) + maximum[r], lse, shift);
        } else {
          p.lse[place] = kLn2 * (lse + shift);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= inverse[i / 2 % 2];
    if constexpr (kV != V::kIo) unscale();
    if (kFindsNonfinite ? is_noted() : task().v_bad != 0) add_nonfinite();
    if (is_split()) {
      write_part();
      return;
    }
    if (p.o_vec) {
      store_rows();
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint16_t* place = p.out + task().out + (row() % 64 + 8 * r) * p.o_ss;
      if (query(r) < p.seqlen_q) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 4; ++i) {
          const int d = 8 * (i / 2) + 2 * quad() + i % 2;
          if (d < p.head_dim_v) place[d * p.o_sd] = static_cast<uint16_t>(to_io2(o[i / 2 * 4 + 2 * r + i % 2], 0.f));
        }
      }
    }
  }

  // O in V's unit: scales of a block are in it already, those of a head, and units of channels, are not.
  __device__ __forceinline__ void unscale() {
    const int64_t channels = static_cast<int64_t>(task().head_kv) * kHeadDim + 2 * quad();
    const float* v_mean = p.v_mean + mean_place() + 2 * quad();
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      float2 scale = {1.f, 1.f};
      if constexpr (kV == V::kFp8) scale = __ldg(reinterpret_cast<const float2*>(p.v_scale + channels + 8 * j));
      if constexpr (kV == V::kInt8) scale = __ldg(reinterpret_cast<const float2*>(v_mean + kHeadDim + 8 * j));
      const float2 mean = __ldg(reinterpret_cast<const float2*>(v_mean + 8 * j));
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        o[4 * j + i] = fmaf(o[4 * j + i], scale.x, mean.x);
        o[4 * j + i + 1] = fmaf(o[4 * j + i + 1], scale.y, mean.y);
      }
    }
  }

  // Stores the warp's 16 rows of O, half of the channels at a time, by way of the shared memory of its own queries:
  // each row's halves as a whole, 16 bytes per lane.
  __device__ __forceinline__ void store_rows() {
    constexpr int kChunks = kHeadDim / 16;  // of 16 bytes, in half a row
    constexpr int kRowsAtATime = 32 / kChunks;
    const uint32_t lane = thread_index() % 32, first = row() % 64 - lane / 4;
    const uint32_t staged = shared_address(&s.q[(row() - lane / 4) * kHeadDim]);
    auto at = [&](uint32_t r, uint32_t chunk) { return staged + r * kHeadDim + swizzled<kHeadDim>(chunk, r) * 16; };
    const uint32_t r = lane / kChunks, chunk = lane % kChunks;
    uint16_t* place = p.out + task().out + (first + r) * p.o_ss + chunk * 8;
    const int left = p.seqlen_q - task().row - static_cast<int>(first + r);  // rows from this lane's first one on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = half * kChunks; j < (half + 1) * kChunks; j += 2) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = to_io2(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
        store_matrices(at(lane % 16, j % kChunks + lane / 16), x);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kChunks / 2; ++i) {
        uint32_t x[4];
        load_shared(x, at(i * kRowsAtATime + r, chunk));
        if (i * kRowsAtATime < left) store16(place + i * kRowsAtATime * p.o_ss + half * kHeadDim / 2, x);
      }
      __syncwarp();
    }
  }

  // For combine.cu.
  __device__ __forceinline__ void write_part_lse(int64_t place, float weight, float lse, float shift) {
    const int64_t rows = static_cast<int64_t>(p.heads_total) * p.seqlen_q;
    const int parts = grid_height();
    p.part_lse[blockIdx.y * rows + place] = weight;
    p.part_lse[(parts + blockIdx.y) * rows + place] = lse;
    if (has_last_keys()) p.part_lse[2 * parts * rows + place] = shift;
  }

  __device__ __forceinline__ void write_part() {
    const int64_t first = static_cast<int64_t>(blockIdx.y * p.heads_total + task().head) * p.seqlen_q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* place = p.part_out + (first + query(r)) * kHeadDim + 2 * quad();
      if (query(r) >= p.seqlen_q) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(place + 8 * j) = make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
      }
    }
  }

  // The turn in which V was last found not finite, of the turns that share this one's note.
  __device__ __forceinline__ volatile int& note() { return s.notes[turn % kNotes]; }
  __device__ __forceinline__ bool is_noted() { return note() == turn; }
  __device__ __forceinline__ int* first_nonfinite() const {
    return p.v_first + static_cast<int64_t>(task().head_kv) * 2 * kHeadDim;
  }

  // Infinities and NaN of V that were left out: each reaches exactly the rows that see its key.
  __device__ __forceinline__ void add_nonfinite() {
    const int* place = first_nonfinite() + 2 * quad();
    auto first = [&](int d) { return kFindsNonfinite ? load_current(place + d) : place[d]; };
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const int d = 8 * (i / 4) + i % 2;
      int seen = p.seqlen_k - 1;
      if constexpr (kCausal) seen = min(seen, query(i / 2 % 2));
      if (first(d) <= seen) o[i] += infinity();
      if (first(kHeadDim + d) <= seen) o[i] -= infinity();
    }
  }
};

}  // namespace sagert
