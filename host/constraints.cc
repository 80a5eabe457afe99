// SPDX-License-Identifier: Apache-2.0
#include "constraints.h"

#include <algorithm>
#include <limits>

#include "driver.h"
#include "error.h"
#include "names.h"

namespace sagert {
namespace {

constexpr int64_t kGridMax = std::numeric_limits<int32_t>::max();
constexpr int64_t kRowsPerBlock = 64;    // the smallest tile of any kernel
constexpr int64_t kReductionParts = 32;  // the largest number of parts of a reduction over keys

// Blocks of the largest launch over these rows, at most. No overflow: counts are compared by division.
bool grid_fits(int64_t batch, int64_t heads, int64_t seqlen) {
  if (batch == 0 || heads == 0 || seqlen == 0) return true;
  int64_t per_head = std::max((seqlen - 1) / kRowsPerBlock + 2, kReductionParts);
  return per_head <= kGridMax && heads <= kGridMax / per_head && batch <= kGridMax / per_head / heads;
}

bool in_range(int32_t value, int32_t low, int32_t high) { return low <= value && value <= high; }

struct FlagText {
  const char* code;
  const char* text;
  const char* remedy;
};

// By bit number of SAGERT_FLAG_*.
constexpr FlagText kFlagTexts[] = {
    {"causal", "has no causal variant", "drop is_causal"},
    {"lse", "does not write the log-sum-exp", "drop return_lse"},
    {"mask", "takes no attention mask", "drop attn_mask"},
    {"dropout", "has no dropout", "set dropout_p to 0"},
    {"grad", "has no backward pass", "call it where gradients are off (torch.no_grad)"},
    {"no_smooth_k", "always smooths K", "leave smooth_k on"},
    {"varlen", "takes no packed sequences", "pass padded sequences of equal length"},
    {"window", "has no sliding window", "drop the window"},
    {"bottom_right", "aligns causal queries at the top left only", "use the top-left alignment"},
    {"quantized_kv", "takes no keys and values quantized before", "pass k and v themselves"},
};

std::string range_text(const RowEntry& row) {
  std::string low = capability_text(row.capability_min);
  if (row.capability_min == row.capability_max) return low;
  return concat(low, " to ", capability_text(row.capability_max));
}

Reason describe_one(uint32_t bit, const RowEntry& row, const sagert_request& request, const sagert_device& device) {
  switch (bit) {
    case kCapability:
      return {"capability",
              concat("needs compute capability ", range_text(row), "; this device has ",
                     capability_text(device.capability)),
              concat("use a GPU of compute capability ", range_text(row))};
    case kDriverVersion:
      return {"driver",
              concat("needs a driver with CUDA ", cuda_version_text(row.driver_min), " (",
                     driver_branch_text(row.driver_min), "); this driver has CUDA ",
                     cuda_version_text(device.driver_version)),
              concat("update the driver to ", driver_branch_text(row.driver_min), " or later")};
    case kPrecision:
      return {"precision",
              concat("computes ", precision_name(row.precision), "; ", precision_name(request.precision), " was asked"),
              concat("ask for precision ", precision_name(row.precision))};
    case kAccuracy:
      return {"accuracy",
              concat("has accuracy class ", accuracy_name(row.accuracy), "; auto chooses among high and standard"),
              concat("ask for precision ", precision_name(row.precision), " by name")};
    case kDtype:
      return {"dtype", concat("takes ", dtype_list(row.dtypes), "; ", dtype_name(request.dtype), " was given"),
              concat("cast to ",
                     (row.dtypes >> SAGERT_DTYPE_BF16 & 1u) != 0 ? std::string("bf16") : dtype_list(row.dtypes))};
    case kHeadDim:
      return {"head_dim", concat("takes head_dim up to ", row.head_dim_max, "; it is ", request.head_dim),
              concat("use a head_dim of at most ", row.head_dim_max)};
    case kHeadDimV:
      if (row.any_head_dim_v != 0) {
        return {"head_dim_v", concat("takes head_dim_v up to ", row.head_dim_max, "; it is ", request.head_dim_v),
                concat("use a head_dim_v of at most ", row.head_dim_max)};
      }
      return {"head_dim_v",
              concat("needs head_dim_v equal to head_dim; they are ", request.head_dim_v, " and ", request.head_dim),
              request.head_dim_v < request.head_dim ? concat("pad head_dim_v to ", request.head_dim, " with zeros")
                                                    : concat("pad head_dim to ", request.head_dim_v, " with zeros")};
    case kSeqlen: {
      bool query = request.seqlen_q > row.seqlen_max;
      return {query ? "seqlen_q" : "seqlen_k",
              concat("takes sequences up to ", row.seqlen_max, "; ", query ? "seqlen_q" : "seqlen_k", " is ",
                     query ? request.seqlen_q : request.seqlen_k),
              query ? concat("split the queries into parts of at most ", row.seqlen_max)
                    : concat("use at most ", row.seqlen_max, " keys")};
    }
    case kGrid:
      return {"grid",
              concat("would need more than ", kGridMax, " thread blocks for batch ", request.batch, ", heads_q ",
                     request.heads_q, ", seqlen_q ", request.seqlen_q, ", seqlen_k ", request.seqlen_k),
              "split the batch"};
    case kVariant:
      return {"variant",
              concat("was not built for head_dim ", request.head_dim, ", ", dtype_name(request.dtype),
                     (request.flags & SAGERT_FLAG_CAUSAL) != 0 ? ", causal" : ", not causal"),
              ""};
    case kRow:
      return {"row", concat("is not the row asked for, ", request.row <= kRowCount ? kRows[request.row - 1].id : "?"),
              ""};
    default:
      for (uint32_t i = 0; i < sizeof(kFlagTexts) / sizeof(kFlagTexts[0]); ++i) {
        if (bit == 1u << (kFlagShift + i)) return {kFlagTexts[i].code, kFlagTexts[i].text, kFlagTexts[i].remedy};
      }
      return {"flags", "does not serve a flag", ""};
  }
}

}  // namespace

int32_t find_variant(int32_t row_index, const sagert_request& request) {
  int32_t causal = (request.flags & SAGERT_FLAG_CAUSAL) != 0 ? 1 : 0;
  int64_t needed = std::max(request.head_dim, request.head_dim_v);
  int32_t best = -1;
  for (int32_t i = 0; i < kVariantCount; ++i) {
    const VariantEntry& variant = kVariants[i];
    if (variant.row != row_index || variant.causal != causal || variant.dtype != request.dtype ||
        variant.head_dim < needed) {
      continue;
    }
    if (best < 0 || variant.head_dim < kVariants[best].head_dim) best = i;
  }
  return best;
}

uint32_t broken_constraints(const RowEntry& row, int32_t row_index, const sagert_request& request,
                            const sagert_device& device) {
  uint32_t broken = 0;
  if (!in_range(device.capability, row.capability_min, row.capability_max)) broken |= kCapability;
  if (device.driver_version < row.driver_min) broken |= kDriverVersion;
  if (request.row != 0 && request.row - 1 != row_index) broken |= kRow;
  if (request.precision == SAGERT_PRECISION_AUTO) {
    if (row.accuracy != SAGERT_ACCURACY_HIGH && row.accuracy != SAGERT_ACCURACY_STANDARD) broken |= kAccuracy;
  } else if (request.precision != row.precision) {
    broken |= kPrecision;
  }
  if ((row.dtypes >> request.dtype & 1u) == 0) broken |= kDtype;
  if (request.head_dim > row.head_dim_max) broken |= kHeadDim;
  if (request.head_dim_v != request.head_dim && (row.any_head_dim_v == 0 || request.head_dim_v > row.head_dim_max)) {
    broken |= kHeadDimV;
  }
  if (std::max(request.seqlen_q, request.seqlen_k) > row.seqlen_max) broken |= kSeqlen;
  if (!grid_fits(request.batch, request.heads_q, request.seqlen_q) ||
      !grid_fits(request.batch, request.heads_kv, request.seqlen_k)) {
    broken |= kGrid;
  }
  broken |= (request.flags & ~row.flags & kAllFlags) << kFlagShift;
  constexpr uint32_t kPackedAndQuantized = SAGERT_FLAG_VARLEN | SAGERT_FLAG_QUANTIZED_KV;
  if ((request.flags & kPackedAndQuantized) == kPackedAndQuantized) broken |= SAGERT_FLAG_QUANTIZED_KV << kFlagShift;
  constexpr uint32_t kVariantAxes = kDtype | kHeadDim | kHeadDimV | (SAGERT_FLAG_CAUSAL << kFlagShift);
  if ((broken & (kVariantAxes | kCapability)) == 0 && find_variant(row_index, request) < 0) broken |= kVariant;
  return broken;
}

std::vector<Reason> describe(uint32_t broken, const RowEntry& row, const sagert_request& request,
                             const sagert_device& device) {
  std::vector<Reason> reasons;
  for (uint32_t bit = 1; bit != 0; bit <<= 1) {
    if ((broken & bit) == 0) continue;
    reasons.push_back(describe_one(bit, row, request, device));
    if (bit != kCapability || (broken & kPrecision) != 0) continue;
    for (int32_t i = 0; i < kAbsenceCount; ++i) {
      const AbsenceEntry& absence = kAbsences[i];
      if (absence.precision == row.precision &&
          in_range(device.capability, absence.capability_min, absence.capability_max)) {
        reasons.push_back({"absent", absence.reason, ""});
      }
    }
  }
  return reasons;
}

}  // namespace sagert
