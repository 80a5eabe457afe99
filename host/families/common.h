// SPDX-License-Identifier: Apache-2.0
// What the families' plans have in common.
#ifndef SAGERT_HOST_FAMILIES_COMMON_H_
#define SAGERT_HOST_FAMILIES_COMMON_H_

#include <cstdint>

#include "../family.h"
#include "../request.h"
#include "sagert.h"

namespace sagert {

constexpr double kLog2E = 1.4426950408889634;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }  // values that selection has bounded

// Strides with those of single-element dimensions, which mean nothing, set to 0.
struct Strides {
  int64_t b, h, s, d;
};

inline Strides strides_of(const sagert_tensor& tensor, int64_t b, int64_t h, int64_t s, int64_t d) {
  return {b == 1 ? 0 : tensor.stride[0], h == 1 ? 0 : tensor.stride[1], s == 1 ? 0 : tensor.stride[2],
          d == 1 ? 1 : tensor.stride[3]};
}

// Rows are contiguous and aligned to 16 bytes, at strides that are multiples of `elements`, a power of two.
inline bool has_aligned_rows(const sagert_tensor& tensor, const Strides& strides, int64_t elements) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && strides.d == 1 &&
         ((strides.b | strides.h | strides.s) & (elements - 1)) == 0;
}

// How Q, K, V and the output lie in memory, and which of them the kernels may read or write by vectors: rows that are
// full, contiguous and aligned, at strides that are multiples of `elements`.
struct Operands {
  Strides q{}, k{}, v{}, out{};
  bool q_vec = false, k_vec = false, v_vec = false, out_vec = false;
};

inline Operands operands_of(const sagert_attention_args& args, int64_t padded_head_dim, int64_t elements) {
  Operands x;
  bool varlen = (args.flags & SAGERT_FLAG_VARLEN) != 0;  // packed: one batch entry
  int64_t batch = varlen ? 1 : args.batch;
  int64_t queries = varlen ? args.total_q : args.seqlen_q;
  int64_t keys = varlen ? args.total_k : args.seqlen_k;
  x.q = strides_of(args.q, batch, args.heads_q, queries, args.head_dim);
  x.k = strides_of(args.k, batch, args.heads_kv, keys, args.head_dim);
  x.v = strides_of(args.v, batch, args.heads_kv, keys, args.head_dim_v);
  x.out = strides_of(args.out, batch, args.heads_q, queries, args.head_dim_v);
  auto is_vector = [&](const sagert_tensor& tensor, const Strides& strides, int64_t head_dim) {
    return has_aligned_rows(tensor, strides, elements) && head_dim == padded_head_dim;
  };
  x.q_vec = is_vector(args.q, x.q, args.head_dim);
  x.k_vec = is_vector(args.k, x.k, args.head_dim);
  x.v_vec = is_vector(args.v, x.v, args.head_dim_v);
  x.out_vec = is_vector(args.out, x.out, args.head_dim_v);
  return x;
}

// Hands out offsets into a buffer.
class Layout {
 public:
  // The offset of a buffer; 0 for one that is not needed, whose pointer the kernels leave alone.
  int64_t reserve(bool needed, int64_t bytes) {
    constexpr int64_t kAlignment = 256;
    if (!needed) return 0;
    int64_t offset = size_;
    size_ += round_up(bytes, kAlignment);
    return offset;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// Where buffers lie: `kv` has what quantization makes of K and V alone, `call` what one call needs besides. Where K and
// V are not quantized by a call of their own, both are in the workspace, `kv` in front.
struct Memory {
  const char* kv = nullptr;
  const char* call = nullptr;
  int64_t kv_size = 0;
  int64_t workspace_size = 0;

  const void* in_kv(int64_t offset) const { return kv + offset; }
  const void* in_call(int64_t offset) const { return call + offset; }
};

inline Memory memory_of(const sagert_attention_args& args, const Layout& kv, const Layout& call) {
  const char* workspace = static_cast<const char*>(args.workspace);
  if (has_quantized_kv(args)) return {static_cast<const char*>(args.kv), workspace, kv.size(), call.size()};
  return {workspace, workspace + kv.size(), kv.size(), kv.size() + call.size()};
}

inline void check_memory(const sagert_attention_args& args, const Memory& memory, Phase phase) {
  if (has_quantized_kv(args)) check_kv(args, static_cast<uint64_t>(memory.kv_size));
  if (phase != kPrepareKv) check_workspace(args, static_cast<uint64_t>(memory.workspace_size));
}

constexpr const char* kQStrides[] = {"q_sb", "q_sh", "q_ss", "q_sd"};
constexpr const char* kKStrides[] = {"k_sb", "k_sh", "k_ss", "k_sd"};
constexpr const char* kVStrides[] = {"v_sb", "v_sh", "v_ss", "v_sd"};
constexpr const char* kOutStrides[] = {"o_sb", "o_sh", "o_ss", "o_sd"};

template <typename Sink>
void pass_strides(Sink& sink, const char* const names[4], const Strides& strides) {
  sink.i64(names[0], strides.b);
  sink.i64(names[1], strides.h);
  sink.i64(names[2], strides.s);
  sink.i64(names[3], strides.d);
}

}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_COMMON_H_
