// SPDX-License-Identifier: Apache-2.0
// Workspace layouts and parameters are those of kernels/portable/prepass.py and attention.py.
#include "portable.h"

#include <algorithm>
#include <string>

#include "../error.h"
#include "../launch.h"
#include "../request.h"
#include "../table.h"
#include "common.h"
#include "planned.h"
#include "portable_plan.h"

namespace sagert {
namespace portable {
namespace {

// In launch order; plain rows have the first three and attention.
constexpr int kRoles[] = {kKvStats, kQuantizeKv, kQuantizeQ, kScanMask, kListBlocks, kAttention, kRepair};
constexpr int64_t kKeyPadding = 128;   // K8 and the copy of V end at a multiple of this
constexpr int64_t kKeysPerPart = 512;  // statistics of K and V are reduced in parts of about this many keys
constexpr int64_t kPartsMax = 32;
constexpr int64_t kVectorElements = 16;  // what the kernels' vector path needs strides to be multiples of
constexpr int64_t kDirectStrideMax = int64_t{1} << 24;  // beyond it V is copied
constexpr int64_t kOffsetMax = int64_t{1} << 31;        // of an element within one head of V^T

void place_buffers(Plan& plan, const Traits& traits) {
  int64_t d = plan.padded_head_dim;
  const sagert_attention_args& args = *plan.args;
  int64_t keys = (plan.varlen ? args.heads_kv : plan.heads_kv_total) * plan.k_rows;
  int64_t queries = (plan.varlen ? args.heads_q : plan.heads_q_total) * plan.q_rows;
  Layout kv;
  Layout call;
  constexpr int64_t kWord = 4;
  plan.k_sum = kv.reserve(true, plan.heads_kv_total * plan.parts * d * kWord);
  plan.v_amax = kv.reserve(traits.values == Values::kFp8, plan.heads_kv_total * plan.parts * d * kWord);
  plan.v_bad = kv.reserve(true, plan.heads_kv_total * plan.parts * 2 * d * kWord);
  plan.k_bad = kv.reserve(true, plan.heads_kv_total * plan.parts * kWord);
  plan.k_shift = kv.reserve(true, plan.heads_kv_total * d * kWord);
  plan.k8 = kv.reserve(true, keys * d * traits.qk_bytes);
  plan.k_scale = kv.reserve(true, keys * kWord);
  bool quantized = traits.values != Values::kIo;
  bool blocks = traits.values == Values::kIntegers;
  plan.v_out = kv.reserve(quantized || plan.copy_v, keys * d * traits.v_bytes);
  plan.v_scale = kv.reserve(quantized, (blocks ? keys / traits.v_block * 2 : plan.heads_kv_total) * d * kWord);
  plan.v_first = kv.reserve(true, plan.heads_kv_total * 2 * d * kWord);
  plan.head_flags = kv.reserve(true, plan.heads_kv_total * kWord);
  plan.q8 = call.reserve(true, queries * d * traits.qk_bytes);
  plan.q_scale = call.reserve(true, queries * kWord);
  plan.q_shift = call.reserve(plan.shift_lse, queries * kWord);
  if (traits.general) plan_general(plan, traits, call);
  plan.memory = memory_of(*plan.args, kv, call);
}

Plan make_plan(const sagert_attention_args& args, const VariantEntry& variant, const Traits& traits) {
  Plan plan;
  plan.args = &args;
  plan.varlen = (args.flags & SAGERT_FLAG_VARLEN) != 0;
  plan.general = traits.general;
  int64_t d = plan.padded_head_dim = variant.head_dim;
  // Without keys one block of padding is still quantized, so that attention finds defined scales.
  plan.seqlen_pad = std::max(round_up(args.seqlen_k, kKeyPadding), kKeyPadding);
  // Packed sequences start at multiples of the padding, see packed_keys in kernels/portable/tiles.py.
  plan.k_rows = plan.varlen ? (args.total_k / kKeyPadding + args.batch) * kKeyPadding : plan.seqlen_pad;
  plan.q_rows = plan.varlen ? args.total_q : args.seqlen_q;
  if (plan.k_rows > kOffsetMax / d) {
    fail(SAGERT_ERROR_UNSUPPORTED, "total_k is ", args.total_k, " in ", args.batch, " sequences; at most ",
         kOffsetMax / d - kKeyPadding * args.batch, " keys can be packed for this head_dim: split the batch");
  }
  plan.heads_kv_total = args.batch * args.heads_kv;
  plan.heads_q_total = args.batch * args.heads_q;
  plan.parts = std::clamp(ceil_div(args.seqlen_k, kKeysPerPart), int64_t{1}, kPartsMax);
  plan.part_rows = std::max(round_up(ceil_div(args.seqlen_k, plan.parts), 64), int64_t{64});
  plan.parts = std::max(ceil_div(args.seqlen_k, plan.part_rows), int64_t{1});

  static_cast<Operands&>(plan) = operands_of(args, d, kVectorElements);

  plan.smooth_k = (args.flags & SAGERT_FLAG_NO_SMOOTH_K) == 0;
  plan.write_lse = (args.flags & SAGERT_FLAG_LSE) != 0;
  // Of quantized K the buffer knows whether it was smoothed: without smoothing its shift is 0.
  plan.shift_lse = plan.write_lse && (plan.smooth_k || has_quantized_kv(args)) && args.seqlen_k > 0;
  bool quantized = traits.values != Values::kIo;
  plan.direct_v = !quantized && plan.v_vec && args.v.data != nullptr && args.seqlen_k > 0 &&
                  plan.v.s > -kDirectStrideMax && plan.v.s < kDirectStrideMax;
  plan.copy_v = !quantized && !plan.direct_v;
  int64_t per_batch = plan.varlen ? 0 : args.heads_kv;
  if (plan.direct_v) {
    plan.attend_v = plan.v;
  } else if (traits.v_bytes == 1) {  // V^T: the third stride is that between channels
    plan.attend_v = {per_batch * d * plan.k_rows, d * plan.k_rows, plan.k_rows, 1};
  } else {
    plan.attend_v = {per_batch * plan.k_rows * d, plan.k_rows * d, d, 1};
  }
  place_buffers(plan, traits);
  return plan;
}

template <typename Sink>
void pass_kv_stats(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("K", args.k.data);
  sink.pointer("V", args.v.data);
  sink.pointer("KSum", plan.kv_at(plan.k_sum));
  sink.pointer("VAmax", plan.kv_at(plan.v_amax));
  sink.pointer("VBad", plan.kv_at(plan.v_bad));
  sink.pointer("KBad", plan.kv_at(plan.k_bad));
  sink.pointer("CuK", args.cu_seqlens_k);
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("heads_kv", narrow(args.heads_kv));
  sink.i32("parts", narrow(plan.parts));
  sink.i32("part_rows", narrow(plan.part_rows));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i32("varlen", plan.varlen);
  pass_strides(sink, kKStrides, plan.k);
  pass_strides(sink, kVStrides, plan.v);
  sink.i32("k_vec", plan.k_vec);
  sink.i32("v_vec", plan.v_vec);
}

template <typename Sink>
void pass_quantize_kv(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("K", args.k.data);
  sink.pointer("V", args.v.data);
  sink.pointer("KSum", plan.kv_at(plan.k_sum));
  sink.pointer("VAmax", plan.kv_at(plan.v_amax));
  sink.pointer("VBad", plan.kv_at(plan.v_bad));
  sink.pointer("KBad", plan.kv_at(plan.k_bad));
  sink.pointer("KShift", plan.kv_at(plan.k_shift));
  sink.pointer("K8", plan.kv_at(plan.k8));
  sink.pointer("KScale", plan.kv_at(plan.k_scale));
  sink.pointer("VOut", plan.kv_at(plan.v_out));
  sink.pointer("VScale", plan.kv_at(plan.v_scale));
  sink.pointer("VFirst", plan.kv_at(plan.v_first));
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.pointer("CuK", args.cu_seqlens_k);
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("seqlen_pad", narrow(plan.seqlen_pad));
  sink.i32("k_rows", narrow(plan.k_rows));
  sink.i32("heads_kv", narrow(args.heads_kv));
  sink.i32("parts", narrow(plan.parts));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i32("smooth_k", plan.smooth_k);
  sink.i32("copy_v", plan.copy_v);
  sink.i32("keep_bad", plan.general);
  sink.i32("varlen", plan.varlen);
  pass_strides(sink, kKStrides, plan.k);
  pass_strides(sink, kVStrides, plan.v);
  sink.i32("k_vec", plan.k_vec);
  sink.i32("v_vec", plan.v_vec);
}

template <typename Sink>
void pass_quantize_q(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("Q", args.q.data);
  sink.pointer("KShift", plan.kv_at(plan.k_shift));
  sink.pointer("Q8", plan.call_at(plan.q8));
  sink.pointer("QScale", plan.call_at(plan.q_scale));
  sink.pointer("QShift", plan.call_at(plan.q_shift));
  sink.pointer("CuQ", args.cu_seqlens_q);
  sink.fp32("scale_log2", static_cast<float>(args.scale * kLog2E));
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i64("q_rows", plan.q_rows);
  sink.i32("heads_q", narrow(args.heads_q));
  sink.i32("group", narrow(args.heads_q / args.heads_kv));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("varlen", plan.varlen);
  pass_strides(sink, kQStrides, plan.q);
  sink.i32("q_vec", plan.q_vec);
  sink.i32("shift_lse", plan.shift_lse);
}

template <typename Sink>
void pass_attention(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("Q8", plan.call_at(plan.q8));
  sink.pointer("QScale", plan.call_at(plan.q_scale));
  sink.pointer("QShift", plan.call_at(plan.q_shift));
  sink.pointer("K8", plan.kv_at(plan.k8));
  sink.pointer("KScale", plan.kv_at(plan.k_scale));
  sink.pointer("V", plan.v_data());
  sink.pointer("VScale", plan.kv_at(plan.v_scale));
  sink.pointer("VFirst", plan.kv_at(plan.v_first));
  sink.pointer("Out", args.out.data);
  sink.pointer("Lse", plan.write_lse ? args.lse : args.workspace);
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("seqlen_pad", narrow(plan.seqlen_pad));
  sink.i32("heads_q", narrow(args.heads_q));
  sink.i32("group", narrow(args.heads_q / args.heads_kv));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i64("v_sb", plan.attend_v.b);
  sink.i64("v_sh", plan.attend_v.h);
  sink.i64("v_ss", plan.attend_v.s);
  pass_strides(sink, kOutStrides, plan.out);
  sink.i32("o_vec", plan.out_vec);
  sink.i32("write_lse", plan.write_lse);
  sink.i32("shift_lse", plan.shift_lse);
}

template <typename Sink>
void pass(Sink& sink, const Plan& plan, int role) {
  switch (role) {
    case kKvStats:
      return pass_kv_stats(sink, plan);
    case kQuantizeKv:
      return pass_quantize_kv(sink, plan);
    case kQuantizeQ:
      return pass_quantize_q(sink, plan);
    default:
      return plan.general ? pass_general(sink, plan, role) : pass_attention(sink, plan);
  }
}

int64_t blocks_of(const Plan& plan, int role, int64_t tile) {
  switch (role) {
    case kKvStats:
      return plan.heads_kv_total * plan.parts;
    case kQuantizeKv:
      return plan.heads_kv_total * (plan.seqlen_pad / tile);
    case kQuantizeQ:
      return plan.heads_q_total * ceil_div(plan.args->seqlen_q, tile);
    default:
      return plan.general ? general_blocks(plan, role, tile) : plan.heads_q_total * ceil_div(plan.args->seqlen_q, tile);
  }
}

Traits read_traits(const VariantEntry& variant) {
  Traits traits;
  sagert_attention_args args{};
  args.heads_q = args.heads_kv = 1;
  Plan plan;
  plan.args = &args;
  plan.general = traits.general = variant.kernels[kScanMask] >= 0;
  bool wanted[kRoleCount] = {};
  for (int role : kRoles) wanted[role] = traits.general || role <= kAttention;
  for (int role = 0; role < kRoleCount; ++role) {
    if (wanted[role] == (variant.kernels[role] >= 0)) continue;
    traits.defect =
        concat("row ", kRows[variant.row].id, wanted[role] ? " lacks the kernel" : " has a kernel", " of role ", role);
    return traits;
  }
  for (int role : kRoles) {
    if (!wanted[role]) continue;
    const KernelEntry& entry = kKernels[variant.kernels[role]];
    ParameterList list;
    pass(list, plan, role);
    if (!matches_signature(list.text(), entry.signature)) {
      traits.defect =
          concat("kernel ", entry.file, " takes (", entry.signature, "), but this library passes (", list.text(), ")");
      return traits;
    }
    bool bad_tile = entry.tile <= 0 || ((role == kQuantizeKv || role == kScanMask) && kKeyPadding % entry.tile != 0);
    if (bad_tile) {
      traits.defect = concat("kernel ", entry.file, " has tile ", entry.tile);
      return traits;
    }
  }
  const KernelEntry& quantize_kv = kKernels[variant.kernels[kQuantizeKv]];
  traits.qk_bytes = pointee(quantize_kv.signature, "K8") == "i8" ? 1 : 2;
  std::string v_type = pointee(quantize_kv.signature, "VOut");
  bool fp8 = v_type.compare(0, 3, "fp8") == 0;
  bool integers = kRows[variant.row].precision == SAGERT_PRECISION_INT8_INT8;
  traits.values = integers ? Values::kIntegers : fp8 ? Values::kFp8 : Values::kIo;
  traits.v_bytes = fp8 || v_type == "i8" ? 1 : 2;
  traits.v_block = quantize_kv.tile;
  traits.block_m = kKernels[variant.kernels[kAttention]].tile;
  if (traits.general) traits.block_n = kKernels[variant.kernels[kScanMask]].tile;
  return traits;
}

class Portable : public PlannedFamily<Traits, Plan> {
 public:
  Portable() : PlannedFamily("portable", read_traits) {}

 private:
  Plan make_plan(const Device&, const sagert_attention_args& args, const VariantEntry& variant,
                 const Traits& traits) const override {
    return portable::make_plan(args, variant, traits);
  }

  void enqueue(const Driver& driver, const Device& device, Plan& plan, const VariantEntry& variant, const Traits&,
               Phase phase) const override {
    auto needed = [&](int role) {
      return in_phase(role, phase) && variant.kernels[role] >= 0 && general_needs(plan, role);
    };
    launch_roles(driver, device, variant, kRoles, needed, [&](int role, CUkernel ready) {
      const KernelEntry& kernel = kKernels[variant.kernels[role]];
      KernelParameters parameters;
      pass(parameters, plan, role);
      launch(driver, ready, kernel, blocks_of(plan, role, kernel.tile), parameters, plan.args->stream);
    });
  }
};

}  // namespace
}  // namespace portable

const Family& portable_family() {
  using portable::Portable;
  static const Portable* instance = new Portable;
  return *instance;
}

}  // namespace sagert
