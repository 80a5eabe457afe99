// SPDX-License-Identifier: Apache-2.0
// What the wgmma and the mma family share: K and V quantized in tiles as attention's shared memory has them, blocks of
// keys with 4 scales of K each, and attention that quantizes Q itself.
#ifndef SAGERT_HOST_FAMILIES_TILED_H_
#define SAGERT_HOST_FAMILIES_TILED_H_

#include <cstdint>
#include <string>

#include "../driver.h"
#include "../launch.h"
#include "../table.h"
#include "common.h"
#include "sagert.h"

namespace sagert {
namespace tiled {

constexpr int64_t kWord = 4;
constexpr int64_t kHalf = 2;

// How attention reads V: quantized, in fp16 with a scale per channel, or in 16 bits as the caller has it.
enum class Pv { kFp8, kInt8, kHalf, kIo };

// Bytes of an element of V as attention reads it.
inline int64_t v_bytes(Pv pv) { return pv == Pv::kIo || pv == Pv::kHalf ? 2 : 1; }

// What a kernel's signature says of its parameter `name`, which points to V.
Pv pv_of(const KernelEntry& kernel, const char* name);

// Everything the kernels of both families are told, worked out once per call.
struct Plan : Operands {
  const sagert_attention_args* args = nullptr;
  Pv pv = Pv::kFp8;
  int64_t block = 0;             // keys
  int64_t leading_keys = 0;      // whose V stays in 16 bits, too
  bool v_units = false;          // behind V's means stand units of its channels
  int64_t v_scale_channels = 1;  // of INT8 V that share a scale
  int64_t padded_head_dim = 0, blocks = 0, heads_kv_total = 0, heads_q_total = 0, tiles = 0, section = 0;
  bool int4 = false;  // Q and K
  bool smooth_k = false, write_lse = false, v_jobs = false, copy_v = false, v_stats = false;
  bool finds_nonfinite = false;  // attention does, in 16-bit V, so that the pre-pass need not look through all of it
  // Offsets into memory.kv.
  int64_t k8 = 0, k_scale = 0, k_bad = 0, k_shift = 0, k_norm = 0, v8 = 0, v_scale = 0, v_mean = 0, v_first = 0,
          head_flags = 0;
  Memory memory;

  bool reads_v() const { return pv == Pv::kIo && !copy_v; }  // as the caller has it
  const void* kv_at(int64_t offset) const { return memory.in_kv(offset); }
  const void* call_at(int64_t offset) const { return memory.in_call(offset); }
};

// Fills in all but what V needs and where buffers lie. `block` is in keys, `tile` in queries.
void begin_plan(Plan& plan, const Device& device, const sagert_attention_args& args, const VariantEntry& variant, Pv pv,
                int64_t block, int64_t tile);

// Settles what the pre-pass does with V. `readable`: attention can read the caller's V, if it stays in 16 bits;
// `finds_nonfinite`: it can find where that is not finite.
void plan_v(Plan& plan, bool readable, bool finds_nonfinite);

// Reserves what the pre-pass leaves for attention.
void reserve_quantized(Plan& plan, Layout& kv);

// What is wrong with a kernel's signature, empty when nothing is: its parameters, and the type of V's scales.
std::string defect_of(const KernelEntry& entry, const ParameterList& list);
std::string defect_of(const KernelEntry& entry, const ParameterList& list, Pv pv);

// Parameters of quantize_kv, between its inputs and its strides.
template <typename Sink>
void pass_quantized(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("K8", plan.kv_at(plan.k8));
  sink.pointer("KScale", plan.kv_at(plan.k_scale));
  sink.pointer("KBad", plan.kv_at(plan.k_bad));
  sink.pointer("KShift", plan.kv_at(plan.k_shift));
  sink.pointer("KNorm", plan.kv_at(plan.k_norm));
  sink.pointer("V8", plan.kv_at(plan.v8));
  sink.pointer("VScale", plan.kv_at(plan.v_scale));
  sink.pointer("VMean", plan.kv_at(plan.v_mean));
  sink.pointer("VFirst", plan.kv_at(plan.v_first));
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("blocks", narrow(plan.blocks));
  sink.i32("heads_kv", narrow(args.heads_kv));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i32("smooth_k", plan.smooth_k);
  sink.i32("v_jobs", plan.v_jobs);
  sink.i32("copy_v", plan.copy_v);
  sink.i32("v_stats", plan.finds_nonfinite ? 2 : plan.v_stats ? 1 : 0);  // kFoundLater, kFoundHere in the pre-pass
}

// Parameters of every kernel that reads K and V as the caller has them, at the end.
template <typename Sink>
void pass_kv_strides(Sink& sink, const Plan& plan) {
  pass_strides(sink, kKStrides, plan.k);
  pass_strides(sink, kVStrides, plan.v);
  sink.i32("k_vec", plan.k_vec);
  sink.i32("v_vec", plan.v_vec);
}

// Parameters of attention in front of V, ...
template <typename Sink>
void pass_queries_and_keys(Sink& sink, const Plan& plan) {
  sink.pointer("Q", plan.args->q.data);
  sink.pointer("K8", plan.kv_at(plan.k8));
  sink.pointer("KScale", plan.kv_at(plan.k_scale));
  sink.pointer("KBad", plan.kv_at(plan.k_bad));
  sink.pointer("KShift", plan.kv_at(plan.k_shift));
  sink.pointer("KNorm", plan.kv_at(plan.k_norm));
}

// ... behind V, ...
template <typename Sink>
void pass_results_and_sizes(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("VScale", plan.kv_at(plan.v_scale));
  sink.pointer("VMean", plan.kv_at(plan.v_mean));
  sink.pointer("VFirst", plan.kv_at(plan.v_first));
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.pointer("Out", args.out.data);
  sink.pointer("Lse", plan.write_lse ? args.lse : args.workspace);
  sink.fp32("scale_log2", static_cast<float>(args.scale * kLog2E));
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("blocks", narrow(plan.blocks));
  sink.i32("heads_q", narrow(args.heads_q));
  sink.i32("group", narrow(args.heads_q / args.heads_kv));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i32("tiles", narrow(plan.tiles));
  sink.i32("heads_total", narrow(plan.heads_q_total));
  sink.i32("section", narrow(plan.section));
}

// ... and of the queries' and the output's strides.
template <typename Sink>
void pass_query_strides(Sink& sink, const Plan& plan) {
  pass_strides(sink, kQStrides, plan.q);
  pass_strides(sink, kOutStrides, plan.out);
  sink.i32("q_vec", plan.q_vec);
  sink.i32("o_vec", plan.out_vec);
  sink.i32("write_lse", plan.write_lse);
}

}  // namespace tiled
}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_TILED_H_
