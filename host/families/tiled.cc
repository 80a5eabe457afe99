// SPDX-License-Identifier: Apache-2.0
#include "tiled.h"

#include <algorithm>

#include "../error.h"
#include "../request.h"

namespace sagert {
namespace tiled {
namespace {

constexpr int64_t kKeyGroups = 4;                        // of a block, each with a scale of its own
constexpr int64_t kNormSlots = 32;                       // of a head: kernels/common/bounds.cuh
constexpr int64_t kVectorElements = 8;                   // what vector loads need strides to be multiples of
constexpr int64_t kSectionBytesMax = int64_t{24} << 20;  // of quantized K and V that attention keeps in L2

// Channels of a head as the pre-passes store them: kernels/common/quantize.cuh.
int64_t stored_channels(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Bytes of a key's row, as there.
int64_t k_row_bytes(bool int4, int64_t channels) { return !int4 ? channels : channels <= 128 ? 64 : channels / 2; }

// Query heads whose keys and values stay in half of L2 together, whole groups of them.
int64_t section_of(const Plan& plan, const Device& device) {
  int64_t l2 = device.l2_bytes > 0 ? device.l2_bytes / 2 : kSectionBytesMax;
  int64_t bytes_per_head = plan.blocks * plan.block * plan.padded_head_dim * (1 + v_bytes(plan.pv));
  int64_t heads_kv = std::max(std::min(l2, kSectionBytesMax) / bytes_per_head, int64_t{1});
  int64_t group = plan.args->heads_q / plan.args->heads_kv;
  return std::min(heads_kv * group, plan.heads_q_total);
}

}  // namespace

Pv pv_of(const KernelEntry& kernel, const char* name) {
  std::string type = pointee(kernel.signature, name);
  if (type == "fp16s") return Pv::kHalf;
  return type == "fp8e4nv" ? Pv::kFp8 : type == "i8" ? Pv::kInt8 : Pv::kIo;
}

void begin_plan(Plan& plan, const Device& device, const sagert_attention_args& args, const VariantEntry& variant, Pv pv,
                int64_t block, int64_t tile) {
  plan.args = &args;
  plan.pv = pv;
  plan.block = block;
  plan.padded_head_dim = stored_channels(variant.head_dim);
  // Without keys one block of padding is still quantized, so that attention finds defined scales.
  plan.blocks = std::max(ceil_div(args.seqlen_k, block), int64_t{1});
  plan.heads_kv_total = args.batch * args.heads_kv;
  plan.heads_q_total = args.batch * args.heads_q;
  plan.tiles = ceil_div(args.seqlen_q, tile);
  plan.section = section_of(plan, device);
  static_cast<Operands&>(plan) = operands_of(args, variant.head_dim, kVectorElements);
  plan.smooth_k = (args.flags & SAGERT_FLAG_NO_SMOOTH_K) == 0;
  plan.write_lse = (args.flags & SAGERT_FLAG_LSE) != 0;
}

void plan_v(Plan& plan, bool readable, bool finds_nonfinite) {
  const sagert_attention_args& args = *plan.args;
  bool direct = readable && args.v.data != nullptr && args.seqlen_k > 0;
  plan.copy_v = plan.pv == Pv::kIo && !direct;
  // V that stays in 16 bits brings its own infinities and NaN; only a mask needs to know where they are. Attention does
  // not write to quantized keys and values of the caller's, so that these come with all there is to find.
  const bool masked = (args.flags & SAGERT_FLAG_CAUSAL) != 0, kept = has_quantized_kv(args);
  plan.finds_nonfinite = plan.pv == Pv::kIo && finds_nonfinite && masked && !kept;
  plan.v_stats = plan.pv != Pv::kIo || kept || (masked && !plan.finds_nonfinite);
  plan.v_jobs = plan.v_stats || plan.copy_v;
}

void reserve_quantized(Plan& plan, Layout& kv) {
  int64_t d = plan.padded_head_dim;
  int64_t heads = plan.heads_kv_total;
  int64_t blocks = heads * plan.blocks;
  bool quantized_v = plan.pv != Pv::kIo;
  plan.k8 = kv.reserve(true, blocks * plan.block * k_row_bytes(plan.int4, d));
  plan.k_scale = kv.reserve(true, blocks * kKeyGroups * kWord);
  plan.k_bad = kv.reserve(true, blocks * kKeyGroups * kWord);
  plan.k_shift = kv.reserve(true, heads * d * kWord);
  plan.k_norm = kv.reserve(!quantized_v, heads * kNormSlots * kWord);
  plan.v8 = kv.reserve(quantized_v || plan.copy_v, blocks * plan.block * d * v_bytes(plan.pv));
  plan.v_scale =
      kv.reserve(quantized_v, plan.pv == Pv::kInt8 ? blocks * d / plan.v_scale_channels * kHalf : heads * d * kWord);
  plan.v_mean = kv.reserve(quantized_v, heads * d * (kWord * (plan.v_units ? 2 : 1) + plan.leading_keys * kHalf));
  plan.v_first = kv.reserve(plan.v_stats || plan.finds_nonfinite, heads * 2 * d * kWord);
  plan.head_flags = kv.reserve(true, heads * 2 * kWord);
}

std::string defect_of(const KernelEntry& entry, const ParameterList& list) {
  if (!matches_signature(list.text(), entry.signature)) {
    return concat("kernel ", entry.file, " takes (", entry.signature, "), but this library passes (", list.text(), ")");
  }
  return "";
}

std::string defect_of(const KernelEntry& entry, const ParameterList& list, Pv pv) {
  if (pv != Pv::kIo && pointee(entry.signature, "VScale") != (pv == Pv::kInt8 ? "bf16" : "fp32")) {
    return concat("kernel ", entry.file, " has scales of V in ", pointee(entry.signature, "VScale"));
  }
  return defect_of(entry, list);
}

}  // namespace tiled
}  // namespace sagert
