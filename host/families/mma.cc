// SPDX-License-Identifier: Apache-2.0
// Workspace layout and parameters are those of kernels/sm80/kv_stats.cu, quantize_kv.cu and attention.cu.
#include "mma.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "../error.h"
#include "../launch.h"
#include "../request.h"
#include "../table.h"
#include "common.h"
#include "planned.h"
#include "tiled.h"

namespace sagert {
namespace mma {
namespace {

using tiled::kWord;
using tiled::Pv;

constexpr int kRoles[] = {kKvStats, kQuantizeKv, kQuantizeQ, kAttention};  // in launch order; INT4 alone has the third
constexpr int64_t kBlock = 64;                                             // keys per block of quantized K and V
constexpr int64_t kStepKeys = 128;                                         // that the pre-pass takes at a time
constexpr int64_t kMeans = 16;                       // of blocks of queries, of a thread block of smooth_q
constexpr int64_t kStatistics = 4;                   // of a channel of V
constexpr int64_t kRowStrideMax = int64_t{1} << 24;  // of V that attention reads; other V is copied

// What the signatures of a variant's kernels say.
struct Traits {
  Pv pv = Pv::kFp8;
  bool int4 = false;   // Q and K
  std::string defect;  // not empty: the build and this file disagree
};

// Everything the kernels are told, worked out once per call.
struct Plan : tiled::Plan {
  int64_t parts = 1, part_rows = kStepKeys;  // of the keys of a head, in the pre-pass
  // Offsets into memory.kv.
  int64_t k_sum = 0, v_statistics = 0, part_bad = 0, part_first = 0;
  // Of INT4: blocks of queries that share a mean, and offsets into memory.call.
  int64_t q_blocks = 1, q_block_rows = 1, q_mean = 0, bias = 0;
  // V as attention reads it.
  const void* attend_v = nullptr;
  Strides attend_v_strides{};
};

// Cuts a head's keys into parts: enough to fill a device when there are few heads, few enough that combining them costs
// little. They follow from the length alone, and with them the order of the statistics' sums: K and V become the same
// bits whatever else is in the call.
void cut_keys(Plan& plan) {
  int64_t keys = plan.args->seqlen_k;
  int64_t wanted = std::max(std::min(ceil_div(keys, 256), int64_t{8}), std::min(ceil_div(keys, 1024), int64_t{32}));
  plan.part_rows = std::max(round_up(ceil_div(keys, std::max(wanted, int64_t{1})), kStepKeys), kStepKeys);
  plan.parts = std::max(ceil_div(keys, plan.part_rows), int64_t{1});
}

// As many blocks of queries as leave their products with K no larger than K in 16 bits. Tiles are not divided.
void cut_queries(Plan& plan, int64_t tile) {
  constexpr int64_t kProductBytes = 4, kElementBytes = 2;
  const int64_t blocks_max = std::max(plan.padded_head_dim * kElementBytes / kProductBytes, int64_t{1});
  plan.q_block_rows = tile;
  while (ceil_div(plan.args->seqlen_q, plan.q_block_rows) > blocks_max) plan.q_block_rows *= 2;
  plan.q_blocks = std::max(ceil_div(plan.args->seqlen_q, plan.q_block_rows), int64_t{1});
}

void place_buffers(Plan& plan) {
  Layout kv;
  Layout call;
  reserve_quantized(plan, kv);
  int64_t d = plan.padded_head_dim;
  int64_t parts = plan.heads_kv_total * plan.parts;
  plan.k_sum = kv.reserve(true, parts * d * kWord);
  plan.v_statistics = kv.reserve(plan.v_stats, parts * kStatistics * d * kWord);
  plan.part_bad = kv.reserve(plan.v_stats, parts * kWord);
  plan.part_first = kv.reserve(plan.v_stats, parts * 2 * d * kWord);
  const int64_t means = plan.heads_q_total * plan.q_blocks;
  plan.q_mean = call.reserve(plan.int4, means * d * 2);
  plan.bias = call.reserve(plan.int4, means * plan.blocks * kBlock * kWord);
  plan.memory = memory_of(*plan.args, kv, call);
}

Plan make_plan(const Device& device, const sagert_attention_args& args, const VariantEntry& variant,
               const Traits& traits) {
  Plan plan;
  const int64_t tile = kKernels[variant.kernels[kAttention]].tile;
  plan.int4 = traits.int4;
  begin_plan(plan, device, args, variant, traits.pv, kBlock, tile);
  if (plan.int4) cut_queries(plan, tile);
  plan_v(plan, plan.v_vec && plan.v.s >= 0 && plan.v.s < kRowStrideMax, false);
  cut_keys(plan);
  plan.v_units = plan.pv == Pv::kInt8 && !plan.int4;
  place_buffers(plan);
  if (plan.pv == Pv::kIo && !plan.copy_v) {
    plan.attend_v = args.v.data;
    plan.attend_v_strides = plan.v;
  } else {
    int64_t head = plan.blocks * kBlock * plan.padded_head_dim;
    plan.attend_v = plan.kv_at(plan.v8);
    plan.attend_v_strides = {args.heads_kv * head, head, plan.padded_head_dim, 1};
  }
  return plan;
}

// Parameters with which kv_stats and quantize_kv begin.
template <typename Sink>
void pass_statistics(Sink& sink, const Plan& plan) {
  sink.pointer("K", plan.args->k.data);
  sink.pointer("V", plan.args->v.data);
  sink.pointer("KSum", plan.kv_at(plan.k_sum));
  sink.pointer("VStats", plan.kv_at(plan.v_statistics));
  sink.pointer("PartBad", plan.kv_at(plan.part_bad));
  sink.pointer("PartFirst", plan.kv_at(plan.part_first));
}

template <typename Sink>
void pass_kv_stats(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  pass_statistics(sink, plan);
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("heads_kv", narrow(args.heads_kv));
  sink.i32("parts", narrow(plan.parts));
  sink.i32("part_rows", narrow(plan.part_rows));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i32("v_stats", plan.v_stats);
  pass_kv_strides(sink, plan);
}

template <typename Sink>
void pass_quantize_kv(Sink& sink, const Plan& plan) {
  pass_statistics(sink, plan);
  pass_quantized(sink, plan);
  sink.i32("parts", narrow(plan.parts));
  sink.i32("part_rows", narrow(plan.part_rows));
  pass_kv_strides(sink, plan);
}

template <typename Sink>
void pass_attention(Sink& sink, const Plan& plan) {
  pass_queries_and_keys(sink, plan);
  sink.pointer("V", plan.attend_v);
  pass_results_and_sizes(sink, plan);
  sink.i64("v_sb", plan.attend_v_strides.b);
  sink.i64("v_sh", plan.attend_v_strides.h);
  sink.i64("v_ss", plan.attend_v_strides.s);
  pass_query_strides(sink, plan);
  // Not needed by INT8, and the same address in every form of a call.
  sink.pointer("QMean", plan.int4 ? plan.call_at(plan.q_mean) : plan.args->workspace);
  sink.pointer("Bias", plan.int4 ? plan.call_at(plan.bias) : plan.args->workspace);
  sink.i32("q_blocks", narrow(plan.q_blocks));
  sink.i32("q_block_rows", narrow(plan.q_block_rows));
}

template <typename Sink>
void pass_smooth_q(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("Q", args.q.data);
  sink.pointer("K", args.k.data);
  sink.pointer("KShift", plan.kv_at(plan.k_shift));
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.pointer("QMean", plan.call_at(plan.q_mean));
  sink.pointer("Bias", plan.call_at(plan.bias));
  sink.fp32("scale_log2", static_cast<float>(args.scale * kLog2E));
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("blocks", narrow(plan.blocks));
  sink.i32("heads_q", narrow(args.heads_q));
  sink.i32("group", narrow(args.heads_q / args.heads_kv));
  sink.i32("head_dim", narrow(args.head_dim));
  sink.i32("q_blocks", narrow(plan.q_blocks));
  sink.i32("q_block_rows", narrow(plan.q_block_rows));
  pass_strides(sink, kQStrides, plan.q);
  pass_strides(sink, kKStrides, plan.k);
  sink.i32("q_vec", plan.q_vec);
  sink.i32("k_vec", plan.k_vec);
}

template <typename Sink>
void pass(Sink& sink, const Plan& plan, int role) {
  switch (role) {
    case kKvStats:
      return pass_kv_stats(sink, plan);
    case kQuantizeKv:
      return pass_quantize_kv(sink, plan);
    case kQuantizeQ:
      return pass_smooth_q(sink, plan);
    default:
      return pass_attention(sink, plan);
  }
}

int64_t blocks_of(const Plan& plan, int role) {
  if (role == kAttention) return plan.tiles * plan.heads_q_total;
  if (role == kQuantizeQ) return ceil_div(plan.q_blocks, kMeans) * plan.heads_q_total;
  bool with_v = role == kKvStats ? plan.v_stats : plan.v_jobs;
  return plan.heads_kv_total * plan.parts * (with_v ? 2 : 1);
}

Traits read_traits(const VariantEntry& variant) {
  Traits traits;
  const int32_t index = variant.kernels[kAttention];
  traits.int4 = index >= 0 && pointee(kKernels[index].signature, "K8") == "i4";
  auto is_mine = [&](int role) {
    return std::find(std::begin(kRoles), std::end(kRoles), role) != std::end(kRoles) &&
           (role != kQuantizeQ || traits.int4);
  };
  for (int role = 0; role < kRoleCount; ++role) {
    const bool wanted = is_mine(role);
    if (wanted == (variant.kernels[role] >= 0)) continue;
    traits.defect =
        concat("row ", kRows[variant.row].id, wanted ? " lacks the kernel" : " has a kernel", " of role ", role);
    return traits;
  }
  const KernelEntry& attention = kKernels[variant.kernels[kAttention]];
  traits.pv = tiled::pv_of(attention, "V");
  sagert_attention_args args{};
  args.heads_q = args.heads_kv = 1;
  Plan plan;
  plan.args = &args;
  plan.pv = traits.pv;
  for (int role : kRoles) {
    if (!is_mine(role)) continue;
    const KernelEntry& entry = kKernels[variant.kernels[role]];
    ParameterList list;
    pass(list, plan, role);
    const bool reads_v = role == kQuantizeKv || role == kAttention;
    traits.defect = reads_v ? tiled::defect_of(entry, list, traits.pv) : tiled::defect_of(entry, list);
    if (traits.defect.empty() && (entry.tile <= 0 || entry.tile % kBlock != 0)) {
      traits.defect = concat("kernel ", entry.file, " has tile ", entry.tile);
    }
    if (!traits.defect.empty()) return traits;
  }
  const KernelEntry& quantize_kv = kKernels[variant.kernels[kQuantizeKv]];
  if (tiled::pv_of(quantize_kv, "V8") != traits.pv || (pointee(quantize_kv.signature, "K8") == "i4") != traits.int4) {
    traits.defect = concat("kernel ", attention.file, " does not read K and V as quantize_kv leaves them");
  }
  return traits;
}

class Mma : public PlannedFamily<Traits, Plan> {
 public:
  Mma() : PlannedFamily("mma", read_traits) {}

 private:
  Plan make_plan(const Device& device, const sagert_attention_args& args, const VariantEntry& variant,
                 const Traits& traits) const override {
    return mma::make_plan(device, args, variant, traits);
  }

  void enqueue(const Driver& driver, const Device& device, Plan& plan, const VariantEntry& variant, const Traits&,
               Phase phase) const override {
    auto needed = [&](int role) { return in_phase(role, phase) && variant.kernels[role] >= 0; };
    launch_roles(driver, device, variant, kRoles, needed, [&](int role, CUkernel ready) {
      KernelParameters parameters;
      pass(parameters, plan, role);
      const bool after_own = role != kKvStats && (phase & kPrepareKv) != 0;
      launch(driver, ready, kKernels[variant.kernels[role]], blocks_of(plan, role), parameters, plan.args->stream,
             after_own);
    });
  }
};

}  // namespace
}  // namespace mma

const Family& mma_family() {
  using mma::Mma;
  static const Mma* instance = new Mma;
  return *instance;
}

}  // namespace sagert
