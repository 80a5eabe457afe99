// SPDX-License-Identifier: Apache-2.0
// What the portable family's plain and general rows share: K, V and Q as the pre-pass leaves them.
#ifndef SAGERT_HOST_FAMILIES_PORTABLE_PLAN_H_
#define SAGERT_HOST_FAMILIES_PORTABLE_PLAN_H_

#include <cstdint>
#include <string>

#include "../table.h"
#include "common.h"
#include "sagert.h"

namespace sagert {
namespace portable {

// What P V multiplies: V as it is given, in e4m3, or in integers with scales of blocks of keys.
enum class Values { kIo, kFp8, kIntegers };

// What the table says of a variant's kernels.
struct Traits {
  bool general = false;  // masks, windows, packed sequences: kernels/portable/general.py
  int64_t qk_bytes = 0;  // size of an element of the quantized Q and K
  int64_t v_bytes = 0;   // of an element of the workspace's V
  Values values = Values::kIo;
  int64_t v_block = 0;               // keys of a scale of V, of integers
  int64_t block_m = 0, block_n = 0;  // of general attention
  std::string defect;                // not empty: the build and this library disagree
};

// A mask: which entries of it attention reads where, and the lists of key blocks it leaves.
struct MaskPlan {
  int32_t kind = 0;                // 0 none, 1 bool, 2 the 16-bit type of the inputs, 3 fp32
  int32_t copy = 0;                // 1: the scan copies it to where vectors can read it, 2: and converts it to fp32
  bool vec = false;                // the caller's rows are contiguous, aligned and at strides of multiples of 16
  int64_t masks_h = 1, masks = 0;  // masks that differ: heads of one batch entry, all
  int64_t tiles = 0, blocks = 0, chunks = 0, chunk = 0;
  Strides scan{};  // of the caller's mask, 0 where it does not differ
  int64_t read_b = 0, read_h = 0, read_s = 0;
  int64_t copy_m = 0, copy_s = 0;  // between masks and between rows of the copy
  int64_t list_b = 0, list_h = 0, list_size = 0;
  int64_t classes = 0, lists = 0, copied = 0;  // offsets into memory.call
};

// Everything the kernels are told, worked out once per call.
struct Plan : Operands {
  const sagert_attention_args* args = nullptr;
  bool varlen = false, general = false;
  int64_t padded_head_dim = 0, seqlen_pad = 0, heads_kv_total = 0, heads_q_total = 0, parts = 0, part_rows = 0;
  // Rows of Q8 and of K8 from one head to the next.
  int64_t q_rows = 0, k_rows = 0;
  bool smooth_k = false, write_lse = false, shift_lse = false, copy_v = false, direct_v = false;
  // Offsets into memory.kv and memory.call; 0 for buffers that are not needed, whose pointers the kernels leave alone.
  int64_t k_sum = 0, v_amax = 0, v_bad = 0, k_bad = 0, k_shift = 0, k8 = 0, k_scale = 0, v_out = 0, v_scale = 0;
  int64_t v_first = 0, head_flags = 0, q8 = 0, q_scale = 0, q_shift = 0;
  Memory memory;
  // V as attention reads it.
  Strides attend_v{};
  MaskPlan mask;
  int64_t left = 0, right = 0, v_parts = 1;

  const void* kv_at(int64_t offset) const { return memory.in_kv(offset); }
  const void* call_at(int64_t offset) const { return memory.in_call(offset); }
  bool reads_v() const { return direct_v; }
  const void* v_data() const { return direct_v ? args->v.data : kv_at(v_out); }
};

// Fills in what only general rows need; `call` is where the mask's buffers go.
void plan_general(Plan& plan, const Traits& traits, Layout& call);

// Blocks of a kernel of general rows' own (scan_mask, list_blocks, attention, repair).
int64_t general_blocks(const Plan& plan, int role, int64_t tile);

// Whether a kernel has work to do in this call.
bool general_needs(const Plan& plan, int role);

template <typename Sink>
void pass_general(Sink& sink, const Plan& plan, int role);

}  // namespace portable
}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_PORTABLE_PLAN_H_
