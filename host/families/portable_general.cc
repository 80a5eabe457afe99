// SPDX-License-Identifier: Apache-2.0
// General rows of the portable family: parameters and buffers of kernels/portable/mask.py, general.py and repair.py.
#include <algorithm>

#include "../launch.h"
#include "portable_plan.h"

namespace sagert {
namespace portable {
namespace {

constexpr int64_t kFar = int64_t{1} << 30;  // a window's end beyond every key
constexpr int64_t kListHead = 4;            // counts in front of a list's blocks
constexpr int64_t kMaskAlignment = 16;      // elements: what vector loads of a mask need strides to be multiples of
constexpr int64_t kMaskStrideMax =
    16000000;  // times 127 rows, plus 2^23 keys, stays in 32 bits; beyond it masks are copied
constexpr int64_t kScanBlocks = int64_t{1} << 18;  // thread blocks of a scan, about, at most
constexpr int64_t kChannels = 128;                 // of one attention program
constexpr int64_t kRepairParts = 16;               // thread blocks of a head's repair, at most
constexpr int64_t kRepairBlocks = 512;             // of all heads', about: as a rule they end at once

int64_t bytes_of(int32_t dtype) { return dtype == SAGERT_DTYPE_BOOL ? 1 : dtype == SAGERT_DTYPE_FP32 ? 4 : 2; }

void plan_mask(Plan& plan, const Traits& traits, Layout& call) {
  const sagert_attention_args& args = *plan.args;
  MaskPlan& mask = plan.mask;
  if ((args.flags & SAGERT_FLAG_MASK) == 0 || args.seqlen_k == 0) return;
  mask.scan = strides_of(args.mask, args.batch, args.heads_q, args.seqlen_q, args.seqlen_k);
  if (args.seqlen_k == 1) mask.scan.d = 0;
  // Of one key a stride of 0 reads as well as a stride of 1.
  bool unit = mask.scan.d == 1 || args.seqlen_k == 1;
  mask.vec = unit && args.mask.data != nullptr && reinterpret_cast<uintptr_t>(args.mask.data) % 16 == 0 &&
             mask.scan.b % kMaskAlignment == 0 && mask.scan.h % kMaskAlignment == 0 &&
             mask.scan.s % kMaskAlignment == 0;
  bool near = mask.scan.s >= -kMaskStrideMax && mask.scan.s <= kMaskStrideMax;
  bool other =
      args.mask_dtype != SAGERT_DTYPE_BOOL && args.mask_dtype != SAGERT_DTYPE_FP32 && args.mask_dtype != args.dtype;
  mask.kind = args.mask_dtype == SAGERT_DTYPE_BOOL ? 1 : args.mask_dtype == args.dtype ? 2 : 3;
  bool whole = args.seqlen_k % kMaskAlignment == 0;  // edges are read by vectors, too
  mask.copy = other ? 2 : mask.vec && near && whole ? 0 : 1;

  int64_t masks_b = mask.scan.b == 0 ? 1 : args.batch;
  mask.masks_h = mask.scan.h == 0 ? 1 : args.heads_q;
  mask.masks = masks_b * mask.masks_h;
  mask.tiles = ceil_div(args.seqlen_q, traits.block_m);
  mask.blocks = ceil_div(args.seqlen_k, traits.block_n);
  mask.chunk = std::clamp(ceil_div(mask.masks * mask.tiles * mask.blocks, kScanBlocks), int64_t{1}, mask.blocks);
  mask.chunks = ceil_div(mask.blocks, mask.chunk);
  mask.list_size = kListHead + mask.blocks;
  mask.list_h = mask.masks_h > 1 ? mask.tiles : 0;
  mask.list_b = masks_b > 1 ? mask.tiles * mask.masks_h : 0;
  mask.classes = call.reserve(true, mask.masks * mask.tiles * mask.blocks);
  mask.lists = call.reserve(true, mask.masks * mask.tiles * mask.list_size * 4);
  mask.read_b = mask.scan.b;
  mask.read_h = mask.scan.h;
  mask.read_s = mask.scan.s;
  if (mask.copy == 0) return;
  int64_t row = round_up(args.seqlen_k, kMaskAlignment);
  int64_t rows = mask.scan.s == 0 ? 1 : args.seqlen_q;
  mask.copy_m = rows * row;
  mask.copy_s = mask.scan.s == 0 ? 0 : row;
  mask.copied =
      call.reserve(true, mask.masks * mask.copy_m * bytes_of(mask.copy == 2 ? SAGERT_DTYPE_FP32 : args.mask_dtype));
  mask.read_b = masks_b > 1 ? mask.copy_m * mask.masks_h : 0;
  mask.read_h = mask.masks_h > 1 ? mask.copy_m : 0;
  mask.read_s = mask.copy_s;
}

int64_t repair_parts(const Plan& plan) {
  int64_t share = std::clamp(kRepairBlocks / std::max(plan.heads_q_total, int64_t{1}), int64_t{1}, kRepairParts);
  return std::min(ceil_div(plan.args->seqlen_q, 64), share);
}

const void* mask_data(const Plan& plan) {
  return plan.mask.copy != 0 ? plan.call_at(plan.mask.copied) : plan.args->mask.data;
}

template <typename Sink>
void pass_masks(Sink& sink, const Plan& plan) {
  for (const char* name : {"Mask8", "Mask16", "Mask32"}) sink.pointer(name, mask_data(plan));
}

template <typename Sink>
void pass_place(Sink& sink, const Plan& plan) {
  sink.i32("left", narrow(plan.left));
  sink.i32("right", narrow(plan.right));
  sink.i32("bottom_right", (plan.args->flags & SAGERT_FLAG_BOTTOM_RIGHT) != 0);
}

template <typename Sink>
void pass_scan_mask(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  const MaskPlan& mask = plan.mask;
  for (const char* name : {"Mask8", "MaskF16", "MaskBF16", "Mask32"}) sink.pointer(name, args.mask.data);
  sink.pointer("Classes", plan.call_at(mask.classes));
  for (const char* name : {"Copy8", "Copy16", "Copy32"}) sink.pointer(name, plan.call_at(mask.copied));
  sink.i32("mask_dtype", args.mask_dtype);
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i32("tiles", narrow(mask.tiles));
  sink.i32("blocks", narrow(mask.blocks));
  sink.i32("chunks", narrow(mask.chunks));
  sink.i32("chunk", narrow(mask.chunk));
  sink.i32("heads", narrow(mask.masks_h));
  pass_place(sink, plan);
  sink.i64("m_sb", mask.scan.b);
  sink.i64("m_sh", mask.scan.h);
  sink.i64("m_ss", mask.scan.s);
  sink.i64("m_sk", mask.scan.d);
  sink.i32("mask_vec", mask.vec);
  sink.i32("copy_mask", mask.copy);
  sink.i64("c_sm", mask.copy_m);
  sink.i64("c_ss", mask.copy_s);
}

template <typename Sink>
void pass_list_blocks(Sink& sink, const Plan& plan) {
  sink.pointer("Classes", plan.call_at(plan.mask.classes));
  sink.pointer("Lists", plan.call_at(plan.mask.lists));
  sink.i32("blocks", narrow(plan.mask.blocks));
  sink.i32("list_size", narrow(plan.mask.list_size));
}

// Sizes, places and V, which attention and repair take alike. `is_attention`: v_parts stands among them.
template <typename Sink>
void pass_sizes(Sink& sink, const Plan& plan, bool is_attention) {
  const sagert_attention_args& args = *plan.args;
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i32("seqlen_k", narrow(args.seqlen_k));
  sink.i64("q_rows", plan.q_rows);
  sink.i32("k_rows", narrow(plan.k_rows));
  sink.i32("heads_q", narrow(args.heads_q));
  sink.i32("group", narrow(args.heads_q / args.heads_kv));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  if (is_attention) sink.i32("v_parts", narrow(plan.v_parts));
  pass_place(sink, plan);
  sink.i32("varlen", plan.varlen);
  sink.i32("direct_v", plan.direct_v);
  sink.i64("v_sb", plan.attend_v.b);
  sink.i64("v_sh", plan.attend_v.h);
  sink.i64("v_ss", plan.attend_v.s);
  pass_strides(sink, kOutStrides, plan.out);
}

template <typename Sink>
void pass_mask_strides(Sink& sink, const Plan& plan) {
  sink.i32("mask_kind", plan.mask.kind);
  sink.i64("m_sb", plan.mask.read_b);
  sink.i64("m_sh", plan.mask.read_h);
  sink.i64("m_ss", plan.mask.read_s);
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
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.pointer("Out", args.out.data);
  sink.pointer("Lse", plan.write_lse ? args.lse : args.workspace);
  sink.pointer("CuQ", args.cu_seqlens_q);
  sink.pointer("CuK", args.cu_seqlens_k);
  pass_masks(sink, plan);
  sink.pointer("Lists", plan.call_at(plan.mask.lists));
  pass_sizes(sink, plan, true);
  sink.i32("o_vec", plan.out_vec);
  sink.i32("write_lse", plan.write_lse);
  sink.i32("shift_lse", plan.shift_lse);
  pass_mask_strides(sink, plan);
  sink.i64("list_sb", plan.mask.list_b);
  sink.i64("list_sh", plan.mask.list_h);
  sink.i64("list_size", plan.mask.list_size);
}

template <typename Sink>
void pass_repair(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("V", plan.v_data());
  sink.pointer("HeadFlags", plan.kv_at(plan.head_flags));
  sink.pointer("Out", args.out.data);
  sink.pointer("CuQ", args.cu_seqlens_q);
  sink.pointer("CuK", args.cu_seqlens_k);
  pass_masks(sink, plan);
  pass_sizes(sink, plan, false);
  pass_mask_strides(sink, plan);
  sink.i32("parts", narrow(repair_parts(plan)));
}

}  // namespace

void plan_general(Plan& plan, const Traits& traits, Layout& call) {
  const sagert_attention_args& args = *plan.args;
  bool window = (args.flags & SAGERT_FLAG_WINDOW) != 0;
  plan.left = window && args.window_left >= 0 ? std::min(args.window_left, kFar) : kFar;
  plan.right = window && args.window_right >= 0 ? std::min(args.window_right, kFar) : kFar;
  if ((args.flags & SAGERT_FLAG_CAUSAL) != 0) plan.right = 0;
  plan.v_parts = ceil_div(args.head_dim_v, kChannels);
  plan_mask(plan, traits, call);
}

int64_t general_blocks(const Plan& plan, int role, int64_t tile) {
  const MaskPlan& mask = plan.mask;
  switch (role) {
    case kScanMask:
      return mask.masks * mask.tiles * mask.chunks;
    case kListBlocks:
      return mask.masks * mask.tiles;
    case kRepair:
      return plan.heads_q_total * repair_parts(plan);
    default:
      return plan.heads_q_total * ceil_div(plan.args->seqlen_q, tile) * plan.v_parts;
  }
}

bool general_needs(const Plan& plan, int role) {
  return (role != kScanMask && role != kListBlocks) || plan.mask.kind != 0;
}

template <typename Sink>
void pass_general(Sink& sink, const Plan& plan, int role) {
  switch (role) {
    case kScanMask:
      return pass_scan_mask(sink, plan);
    case kListBlocks:
      return pass_list_blocks(sink, plan);
    case kRepair:
      return pass_repair(sink, plan);
    default:
      return pass_attention(sink, plan);
  }
}

template void pass_general(KernelParameters&, const Plan&, int);
template void pass_general(ParameterList&, const Plan&, int);

}  // namespace portable
}  // namespace sagert
