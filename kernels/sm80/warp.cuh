// SPDX-License-Identifier: Apache-2.0
// What the schedules of a warp share: its queries' fragments, Q K^T, masks, row maxima, and the epilogue.
#pragma once

#include "copies.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/load.cuh"
#include "ptx/mma.cuh"
#include "ptx/prefetch.cuh"
#include "queries.cuh"

namespace sagert {

constexpr int kR = 2 * kM;          // rows of a lane: row() + 8 r
constexpr int kMagic = 0x4b400000;  // bits of kRound: integers s added to it are the bits of the float kRound + s
constexpr int kMasked = -8388609;   // bits of kLowest: score of a key that a query does not see
// P's exponent at a row's maximum, log2(448) for e4m3, and the one above which a score moves the maximum. Floats in 16
// bits lose nothing by a margin, and fp16 holds up to 2^15, also as the sum of a step's products with a V of at most 2;
// nor do weights of a step, which are fp32. In e4m3 a row's largest weight is to be exact; rounding has lost nothing
// yet when 2^-8 are added.
constexpr float kAtMaximum = kV == V::kIo ? 8.f : kV == V::kFp8 ? 8.807354922057604f : kV == V::kHalf ? 4.f : 0.f;
constexpr float kLargest = kV == V::kFp8 ? kAtMaximum + 0x1p-8f : kV == V::kHalf ? 8.f : 14.f;
constexpr float kLeastScale = 1e-30f;       // a masked score times this is still far below every other
constexpr float kLeastScaleInt4 = 1e-18f;   // the same where means' products are added
constexpr float kUnseen = -1e18f;           // a score in the unit of the exponent below this is masked
constexpr float kCoarse = 1.f / 64;         // a larger unit of the scores takes the offset of their bits too far
using Scores = int32_t[kM][kStepTiles][4];  // bits of kRound + the integer score

__device__ __forceinline__ void mma_io(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if SAGERT_IO_BF16
  mma_bf16(d, a, b0, b1, d);
#else
  mma_f16(d, a, b0, b1, d);
#endif
}

struct Warp {
  const Params& p;
  Shared& s;
  QueryFragments q;
  float b[kR];    // exponents are c * score + b: -b is the maximum that the sums and O refer to
  float sum[kR];  // of the exponentials
  float o[kM][kChannelTiles][4];
  Scores scores;
  float c[kR], d[kR];  // exponents of the step's scores' bits are c * bits + d
  uint32_t base;       // address of shared memory

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int quad() { return (kEvenV ? thread() : threadIdx.x) % 4; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 * (16 * kM); }
  static __device__ __forceinline__ int row() { return first_row() + lane() / 4; }

  __device__ __forceinline__ Warp(const Params& params, Shared& shared) : p(params), s(shared) {
    int address = shared_address(&shared);
    forget(address);  // it would be worked out anew in every step
    base = address;
  }

  // What depends on the tile: `s.tile` is there.
  __device__ __forceinline__ void place() {
    const int row = s.tile.row + first_row();
    int visible = p.seqlen_k;  // keys that all of the warp's queries see
    int steps = s.tile.steps;
    if constexpr (kCausal) {
      visible = min(visible, row + 1);
      steps = min(steps, (row + 16 * kM - 1) / kStep + 1);
    }
    if (kCausal && row >= p.seqlen_q) steps = 0;
    if (lane() == 0) {
      s.steps[threadIdx.x / 32] = steps;
      s.full[threadIdx.x / 32] = is_bad(0) ? 0 : visible / kStep;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void set_offset(int r) {
    d[r] = !kInt4 ? fmaf(-kRound, c[r], b[r]) : b[r] == -kLowest ? 0.f : b[r];
  }

  // Largest exponent's factor of the lane's rows.
  __device__ __forceinline__ float unit() const {
    float largest = c[0];
#pragma unroll
    for (int r = 1; r < kR; ++r) largest = fmaxf(largest, c[r]);
    return largest;
  }

  // Exponents of row r take the place of its scores: the lane's largest has `peak`, the others are what lies between.
  __device__ __forceinline__ void set_exponents(int r, int top, float peak) {
    if (top == kMasked) peak = kLowest;
    const float highest = __int_as_float(top);
#pragma unroll
    for (int n = 0; n < kStep / 4; ++n) {
      int& x = scores[r / 2][n / 2][r % 2 * 2 + n % 2];
      x = __float_as_int(fmaf(__int_as_float(x) - highest, c[r], peak));
    }
    c[r] = 1.f;
    d[r] = 0.f;
  }

  // Scores of INT4 take the unit of the exponent, and what was taken off the queries comes back.
  __device__ __forceinline__ void add_bias(int stage, float k_scale) {
    int t = threadIdx.x;
    forget(t);
    float q_scale[kR];
    load_shared(q_scale, SAGERT_AT(base, q_scale) + (t >> 2) * (4 * kR));
#pragma unroll
    for (int r = 0; r < kR; ++r) c[r] = fmaxf(q_scale[r] * k_scale, kLeastScaleInt4);
    const uint32_t place = SAGERT_AT(base, bias) + stage * kStep * 4 + (t & 3) * 8;
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
      float two[2];
      load_shared(two, place + n * 32);
#pragma unroll
      for (int i = 0; i < 4 * kM; ++i) {
        int& x = scores[i / 4][n][i % 4];
        x = __float_as_int(fmaf(__int_as_float(x) - kRound, c[i / 2], two[i % 2]));
      }
    }
#pragma unroll
    for (int r = 0; r < kR; ++r) c[r] = 1.f;
  }

  // The lane's largest score of row r, when it has the unit of the exponent.
  __device__ __forceinline__ float row_highest(int r) const {
    const int m = r / 2, h = r % 2 * 2;
    float top = __int_as_float(scores[m][0][h]);
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) {
      top = fmaxf(fmaxf(top, __int_as_float(scores[m][n][h])), __int_as_float(scores[m][n][h + 1]));
    }
    return top < kUnseen ? kLowest : top;
  }

  // As reduce(), when the scores have the unit of the exponent.
  template <typename F>
  __device__ __forceinline__ void reduce_biased(F scale_weights) {
    int t = threadIdx.x;
    forget(t);
    float x[kR];
    const uint32_t rows = base + (t >> 2) * (4 * kR);
    load_shared(b, SAGERT_AT(rows, maximum));
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      set_offset(r);
      x[r] = row_highest(r);
    }
    bool within = true;
#pragma unroll
    for (int r = 0; r < kR; ++r) within = within & x[r] + b[r] <= kLargest;
    if (__any_sync(~0u, !within)) {
#pragma unroll
      for (int r = 0; r < kR; ++r) advance_maximum(r, x[r], scale_weights);
      __syncwarp();  // all four lanes of a row have read the maximum
      if ((t & 3) == 0) store_shared(SAGERT_AT(rows, maximum), b);
      __syncwarp();
    }
  }

  // Exponents' factors of a step, and the row maxima, which move only where a score is too far above them;
  // scale_weights(r, alpha) then, for weights of row r that O lacks. Says whether a maximum of integers has moved.
  template <typename F>
  __device__ __forceinline__ bool reduce(int stage, float k_scale, F scale_weights) {
    if constexpr (kInt4) {
      add_bias(stage, k_scale);
      reduce_biased(scale_weights);
      return false;
    } else {
      return reduce_integers(k_scale, scale_weights);
    }
  }
  __device__ __forceinline__ void reduce(int stage, float k_scale) {
    reduce(stage, k_scale, [](int, float) {});
  }

  // Exponents' factors of a step, which has masked scores only where `masks`.
  template <bool masks>
  __device__ __forceinline__ void set_scales(float k_scale) {
    int t = threadIdx.x;
    forget(t);
    float q_scale[kR];
    const uint32_t rows = base + (t >> 2) * (4 * kR);
    load_shared(q_scale, SAGERT_AT(rows, q_scale));
    load_shared(b, SAGERT_AT(rows, maximum));
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      c[r] = q_scale[r] * k_scale;
      if constexpr (masks) c[r] = fmaxf(c[r], kLeastScale);
      set_offset(r);
    }
  }

  template <typename F>
  __device__ __forceinline__ bool reduce_integers(float k_scale, F scale_weights) {
    int t = threadIdx.x;
    forget(t);
    float x[kR];
    set_scales<true>(k_scale);
#pragma unroll
    for (int r = 0; r < kR; ++r) x[r] = fmaf(__int_as_float(row_top(r)), c[r], d[r]);
#pragma unroll
    for (int r = 1; r < kR; ++r) x[0] = fmaxf(x[0], x[r]);
    if (!__any_sync(~0u, x[0] > kLargest | unit() > kCoarse)) return false;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int top = row_top(r);
      advance_maximum(r, top == kMasked ? kLowest : scaled(r, top), scale_weights);
    }
    __syncwarp();  // all four lanes of a row have read the maximum
    if ((t & 3) == 0) store_shared(SAGERT_AT(base + (t >> 2) * (4 * kR), maximum), b);
    __syncwarp();
    if (__any_sync(~0u, unit() > kCoarse)) {
#pragma unroll
      for (int r = 0; r < kR; ++r) set_exponents(r, row_top(r), scaled(r, row_top(r)) + b[r]);
    }
    return true;
  }

  // No step after `step` moves a maximum or needs a mask; a loop of its own asks for V that is finite, too.
  __device__ __forceinline__ bool settles(int step) const {
    if (kApart && is_bad(1)) return false;
    float bound[kR];
    load_shared(bound, base + kBoundsAt + (thread() >> 2) * (4 * kR));
    bool within = step <= load_shared_s32(SAGERT_AT(base, full) + thread() / 32 * 4);
#pragma unroll
    for (int r = 0; r < kR; ++r) within = within & is_bounded(b[r], bound[r], kLargest);
    return __all_sync(~0u, within);
  }

  // A score in the unit of the exponent, from its bits.
  __device__ __forceinline__ float scaled(int r, int bits) const { return (__int_as_float(bits) - kRound) * c[r]; }

  // `largest`: of the lane's scores of row r, in the unit of the exponent.
  template <typename F>
  __device__ __forceinline__ void advance_maximum(int r, float largest, F scale_weights) {
    const float highest = quad_max(largest);
    float moved = __fsub_rd(kAtMaximum, highest);
    if constexpr (kBounded) {
      const float bound = load_shared_f32(base + kBoundsAt + (thread() >> 2) * (4 * kR) + 4 * r);
      moved = bounded_offset(highest, bound, kAtMaximum, kLargest);
    }
    const float next = highest + b[r] <= kLargest ? b[r] : moved;
    const float alpha = exp2_approx(next - b[r]);
    b[r] = next;
    scale_weights(r, alpha);
    sum[r] *= alpha;
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      o[r / 2][j][r % 2 * 2] *= alpha;
      o[r / 2][j][r % 2 * 2 + 1] *= alpha;
    }
    set_offset(r);
    if (next == -kLowest) d[r] = 0.f;  // the row has seen no key: masked scores are to vanish beside d
  }

  // threadIdx.x for what is worked out anew in every step: kept, it would take registers.
  static __device__ __forceinline__ unsigned thread() {
    int t = threadIdx.x;
    forget(t);
    return t;
  }

  // Does the warp see this step? All lanes agree: as a vote the compiler knows.
  __device__ __forceinline__ bool sees(int step) const {
    return !kCausal || __all_sync(~0u, step < load_shared_s32(SAGERT_AT(base, steps) + thread() / 32 * 4));
  }

  // Where blocks of V may be even: places of a lane's sums between steps, and of what O has too much, which is the
  // first lane's of a row to change.
  __device__ __forceinline__ uint32_t sums() const { return base + kSumsAt + thread() * (4 * kR); }
  __device__ __forceinline__ uint32_t offsets() const { return base + kOffsetsAt + (thread() >> 2) * (4 * kR); }

  // What this lane gives ldmatrix of the keys and the values of a stage, and of the last keys' values of a slot.
  __device__ __forceinline__ uint32_t k_lane(int stage) const {
    if constexpr (kKeepPlaces) return kept_place(2) + stage * kKTileBytes;
    return k_lane_at(SAGERT_AT(base, k) + stage * kKTileBytes);
  }
  __device__ __forceinline__ uint32_t v_lane(int stage) const {
    if constexpr (kKeepPlaces) return kept_place(3) + stage * kVTileBytes;
    return v_lane_at(SAGERT_AT(base, v) + stage * kVTileBytes);
  }
  __device__ __forceinline__ uint32_t tail_lane(int slot) const {
    if constexpr (kKeepPlaces) return kept_place(3) + tail_behind(slot);
    return v_lane_at(tail_at(base, slot));
  }
  // Of those that stand in shared memory for this thread, as Places has them.
  __device__ __forceinline__ uint32_t kept_place(int i) const {
    return load_shared_s32(base + kTargetsAt + thread() * 16 + 4 * i);
  }
  static __device__ __forceinline__ uint32_t k_lane_at(uint32_t tile) {
    const unsigned lane = thread() % 32, key = lane / 16 * 8 + lane % 8;
    return tile + key * kKRowBytes + swizzled<kKRowBytes>(lane / 8 % 2, key) * 16;
  }
  static __device__ __forceinline__ uint32_t v_lane_at(uint32_t tile) {
    const unsigned lane = thread() % 32, key = lane % 8;
    if constexpr (kRowsOfV) return tile + lane % 16 * kVRowBytes + (lane / 16 ^ key) * 16;
    return tile + key * kVRowBytes + swizzled<kVRowBytes == 64 ? 64 : 128>(lane / 8, key) * 16;
  }

  // The head's K (0) or V (1) holds an infinity or a NaN. Without a mask nobody asks where 16-bit V is not finite, and
  // the pre-pass does not say.
  __device__ __forceinline__ bool is_bad(int which) const {
    if (kV == V::kIo && !kCausal && which == 1) return false;
    return __ldg(p.head_flags + s.tile.head / p.group * 2 + which) != 0;
  }

  __device__ __forceinline__ const uint16_t* queries() const {
    return p.q + s.tile.head / p.heads_q * p.q_sb + s.tile.head % p.heads_q * p.q_sh + s.tile.row * p.q_ss;
  }

  // To L1: the warp's queries, a row for each lane. They are quantized one row of a lane after the other, which would
  // wait for memory each time.
  __device__ __forceinline__ void prefetch_queries() const {
    const int row = first_row() + lane();
    if (lane() >= 16 * kM || s.tile.row + row >= p.seqlen_q) return;
    const uint16_t* place = queries() + row * p.q_ss;
#pragma unroll
    for (int channel = 0; channel < kChannels; channel += 64) prefetch_l1(place + channel);
  }

  // Quantizes queries that cannot be read as vectors, through shared memory, before anything else is there.
  __device__ __forceinline__ void stage_all(float (&scale)[kR]) {
    uint16_t* staged = reinterpret_cast<uint16_t*>(s.k[0]) + threadIdx.x / 32 * (16 * kChannels);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      stage_queries(p, queries(), first_row() + 16 * m, p.seqlen_q - s.tile.row, staged);
      quantize_queries(p, s.tile, staged + lane() / 4 * kChannels, kChannels, first_row() + 16 * m, m, q, scale);
      __syncwarp();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void begin(float (&scale)[kR]) {
    const float slot = kBounded ? __ldg(norm_slot(p.k_norm, s.tile.head / p.group)) : 0.f;
    if (p.q_vec) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        quantize_queries(p, s.tile, queries() + (row() + 16 * m) * p.q_ss, p.q_ss, first_row() + 16 * m, m, q, scale);
      }
    }
    const float norm = kBounded ? largest_norm(slot) : 0.f;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const bool finite = scale[r] < infinity();
      if constexpr (kBounded) {
        int squares = 0;
#pragma unroll
        for (int k = 0; k < kQueryParts; ++k) {
          squares = add_squares(q[r / 2][k][r % 2], add_squares(q[r / 2][k][r % 2 + 2], squares));
        }
        const float bound = score_bound(scale[r], row_sum(squares), norm);
        Bounds& bounds = *reinterpret_cast<Bounds*>(reinterpret_cast<char*>(&s) + kBoundsAt);
        if (quad() == 0) bounds.bound[threadIdx.x / 32][lane() / 4][r] = bound;
      }
      sum[r] = finite ? 0.f : nan();
      if (quad() == 0) s.q_scale[threadIdx.x / 32][lane() / 4][r] = finite ? scale[r] : 0.f;
      b[r] = -kLowest;
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kQueryPartsShared; ++k) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t (&x)[4] = q[m][kQueryParts - kQueryPartsShared + k];
        s.q[k][m][threadIdx.x] = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) o[m][j][0] = o[m][j][1] = o[m][j][2] = o[m][j][3] = 0.f;
    }
  }

  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                  const int32_t (&c)[4]) {
    if constexpr (kInt4) {
      mma_s4(d, a, b0, b1, c);
    } else {
      mma_s8(d, a, b0, b1, c);
    }
  }

  // Q K^T of a step's keys in `stage`.
  __device__ __forceinline__ void multiply_k(int stage) {
    const uint32_t address = k_lane(stage);
    int t = threadIdx.x;
    forget(t);
    const uint32_t place = SAGERT_AT(base, q) + t * 16;
#pragma unroll
    for (int k = 0; k < kQueryParts; ++k) {
      constexpr int own = kQueryParts - kQueryPartsShared;
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (k < own) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = q[m][k][i];
        } else {
          load_shared(a[m], place + ((k - own) * kM + m) * (kThreads * 16));
        }
      }
      multiply_k_part(k, address, a);
    }
  }

  // The same of one part of the channels.
  __device__ __forceinline__ void multiply_k_part(int k, uint32_t address, const uint32_t (&a)[kM][4]) {
    constexpr int kLoads = 2;  // of 16 keys, at a time
#pragma unroll
    for (int n = 0; n < kStepTiles; n += 2 * kLoads) {
      uint32_t fragments[2 * kLoads][2];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t x[4];
        load_matrices(x, (address ^ k * 32) + (n + 2 * i) * 8 * kKRowBytes);
        fragments[2 * i][0] = x[0], fragments[2 * i][1] = x[1];
        fragments[2 * i + 1][0] = x[2], fragments[2 * i + 1][1] = x[3];
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2 * kLoads; ++i) {
          constexpr int32_t magic[4] = {kMagic, kMagic, kMagic, kMagic};
          int32_t (&d)[4] = scores[m][n + i];
          if (k == 0) {
            multiply(d, a[m], fragments[i][0], fragments[i][1], magic);
          } else {
            multiply(d, a[m], fragments[i][0], fragments[i][1], d);
          }
        }
      }
    }
  }

  // The scale of this lane's keys of a step, long before it is needed.
  __device__ __forceinline__ float load_k_scale(int step) const {
    int t = threadIdx.x;
    forget(t);
    const float* scales = load_shared_pointer<float>(SAGERT_AT(base, head_k_scale));
    return load_early(scales + step * (4 * kStepBlocks) + (t & 3));
  }

  // Bits of the largest score of a lane's row r.
  __device__ __forceinline__ int row_top(int r) const {
    const int m = r / 2, h = r % 2 * 2;
    int top = max(scores[m][0][h], scores[m][0][h + 1]);
#pragma unroll
    for (int n = 1; n < kStepTiles; ++n) top = max(max(top, scores[m][n][h]), scores[m][n][h + 1]);
    return top;
  }

  // Weights of two neighbouring keys of row r, which join the row's sum.
  __device__ __forceinline__ float2 weigh_two(int r, const int32_t* x) {
    const float first = exp2_approx(fmaf(__int_as_float(x[0]), c[r], d[r]));
    const float second = exp2_approx(fmaf(__int_as_float(x[1]), c[r], d[r]));
    sum[r] += first;
    sum[r] += second;
    return {first, second};
  }

  // Adds a pair of sums in fp16 to two neighbouring channels of O.
  static __device__ __forceinline__ void add_halves(float* x, uint32_t pair) {
    x[0] += from_fp16(static_cast<uint16_t>(pair));
    x[1] += from_fp16(static_cast<uint16_t>(pair >> 16));
  }

  // Masks the lane's row r in a step that holds the end of the keys, the causal diagonal, or bad keys. The score of a
  // visible bad key is -inf, or +inf or NaN: that ends the row.
  __device__ __forceinline__ void mask_row(int r, int step, uint32_t bad) {
    int limit = p.seqlen_k - step * kStep;
    if constexpr (kCausal) limit = min(limit, s.tile.row + row() + 8 * r + 1 - step * kStep);
    limit -= 2 * quad();  // of this lane's keys
#pragma unroll
    for (int n = 0; n < kStep / 4; ++n) {
      if (n / 2 * 8 + n % 2 >= limit) scores[r / 2][n / 2][r % 2 * 2 + n % 2] = kMasked;
    }
    if (!kFewRegisters && !__any_sync(~0u, bad != 0)) return;
    bool undefined = false;
#pragma unroll
    for (int n = 0; n < kStep / 4; ++n) {
      int& x = scores[r / 2][n / 2][r % 2 * 2 + n % 2];
      if (!(bad >> n & 1)) continue;
      undefined = undefined || x >= kMagic;
      x = kMasked;
    }
    if (!undefined) return;
    if constexpr (kEvenV) {
      store_shared_f32(sums() + 4 * r, nan());
    } else {
      sum[r] = nan();
    }
  }

  // Stands between parts of a step: without a branch that depends on the one before, ptxas mixes them until it has too
  // few registers. `never` depends on it; a warp where it is true sleeps, no more.
  static __device__ __forceinline__ void hold(bool never) {
    if (__any_sync(~0u, never)) __nanosleep(1);
  }

  // This lane's keys of a step that hold an infinity or a NaN: bit 2 j + e stands for key 8 j + 2 quad + e.
  __device__ __forceinline__ uint32_t bad_keys(int step) const {
    if (!is_bad(0)) return 0;
    uint32_t bad = 0;
#pragma unroll
    for (int i = 0; i < kStepBlocks; ++i) {
      const int block = step * kStepBlocks + i;
      const int* words = p.k_bad + static_cast<int64_t>(s.tile.head / p.group) * p.blocks * 4 + quad();
      if (kStepBlocks == 1 || block < p.blocks) bad |= static_cast<uint32_t>(words[block * 4]) << i * (kBlock / 4);
    }
    return bad;
  }

  // Masks a step that holds the end of the keys, the causal diagonal, or bad keys.
  __device__ __forceinline__ void mask(int step) {
    int t = threadIdx.x;
    forget(t);
    // All lanes agree: as a vote the compiler knows.
    if (__all_sync(~0u, step < load_shared_s32(SAGERT_AT(base, full) + (t >> 5) * 4))) return;
    const uint32_t bad = bad_keys(step);
#pragma unroll
    for (int r = 0; r < kR; ++r) mask_row(r, step, bad);
  }

  __device__ __forceinline__ void write() {
    float inverse[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      sum[r] = row_sum(sum[r]);
      inverse[r] = p.seqlen_k == 0 ? 0.f : 1.f / sum[r];
      if (kEvenV && s.tile.steps % 2 == 0) inverse[r] = -inverse[r];  // the tile's first step had -V
      const int query = s.tile.row + row() + 8 * r;
      if (p.write_lse && quad() == 0 && query < p.seqlen_q) {
        float& lse = p.lse[static_cast<int64_t>(s.tile.head) * p.seqlen_q + query];
        lse = kLn2 * (__log2f(sum[r]) - b[r] + lse);
      }
    }
    const int64_t channels = static_cast<int64_t>(s.tile.head / p.group) * (kHeadDim * (1 + kEvenV)) + 2 * quad();
    float offset[kR] = {};
    if constexpr (kEvenV) {
      __syncwarp();  // the first lanes have stored them
      load_shared(offset, offsets());
    }
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
      float2 scale = {1.f, 1.f}, mean = {0.f, 0.f};  // scales of a block are in O already
      if constexpr (kV == V::kFp8 || kV == V::kHalf) {
        scale = __ldg(reinterpret_cast<const float2*>(p.v_scale + channels + 8 * j));
      }
      if constexpr (kEvenV) scale = __ldg(reinterpret_cast<const float2*>(p.v_mean + channels + kHeadDim + 8 * j));
      if constexpr (kV != V::kIo) mean = __ldg(reinterpret_cast<const float2*>(p.v_mean + channels + 8 * j));
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        float* x = &o[r / 2][j][r % 2 * 2];
        if constexpr (kEvenV) x[0] -= offset[r], x[1] -= offset[r];
        x[0] = fmaf(x[0] * inverse[r], scale.x, mean.x);
        x[1] = fmaf(x[1] * inverse[r], scale.y, mean.y);
      }
    }
    if (is_bad(1)) add_nonfinite();
    uint16_t* out = p.out + s.tile.head / p.heads_q * p.o_sb + s.tile.head % p.heads_q * p.o_sh;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int query = s.tile.row + row() + 8 * r;
      uint16_t* place = out + query * p.o_ss;
      auto pair = [&](int j) { return to_io2(o[r / 2][j][r % 2 * 2], o[r / 2][j][r % 2 * 2 + 1]); };
      if (p.o_vec) {
        store_row<kChannels>(place, quad(), query < p.seqlen_q, pair);
      } else if (query < p.seqlen_q) {
#pragma unroll
        for (int j = 0; j < kChannelTiles; ++j) {
          const int d = 8 * j + 2 * quad();
          const uint32_t two = pair(j);
          if (d < p.head_dim_v) place[d * p.o_sd] = static_cast<uint16_t>(two);
          if (d + 1 < p.head_dim_v) place[(d + 1) * p.o_sd] = static_cast<uint16_t>(two >> 16);
        }
      }
    }
  }

  // Infinities and NaN of V were left out: each reaches exactly the rows that see its key.
  __device__ __forceinline__ void add_nonfinite() {
    const int* first = p.v_first + static_cast<int64_t>(s.tile.head / p.group) * 2 * kHeadDim + 2 * quad();
#pragma unroll
    for (int j = 0; j < kChannelTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2 * kR; ++i) {
        const int d = 8 * j + i % 2;
        int seen = p.seqlen_k - 1;
        if constexpr (kCausal) seen = min(seen, s.tile.row + row() + 8 * (i / 2));
        float& x = o[i / 4][j][i % 4];
        if (first[d] <= seen) x += infinity();
        if (first[kHeadDim + d] <= seen) x -= infinity();
      }
    }
  }
};

}  // namespace sagert
