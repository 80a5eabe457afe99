// SPDX-License-Identifier: Apache-2.0
#include "names.h"

#include "error.h"

namespace sagert {

const char* precision_name(int32_t precision) {
  switch (precision) {
    case SAGERT_PRECISION_AUTO:
      return "auto";
    case SAGERT_PRECISION_INT8_FP16:
      return "int8_fp16";
    case SAGERT_PRECISION_INT8_FP8:
      return "int8_fp8";
    case SAGERT_PRECISION_INT8_INT8:
      return "int8_int8";
    case SAGERT_PRECISION_INT4_FP8:
      return "int4_fp8";
    case SAGERT_PRECISION_NVFP4:
      return "nvfp4";
    case SAGERT_PRECISION_INT4_FP16:
      return "int4_fp16";
    case SAGERT_PRECISION_INT4_INT8:
      return "int4_int8";
    default:
      return nullptr;
  }
}

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case SAGERT_DTYPE_FP16:
      return "fp16";
    case SAGERT_DTYPE_BF16:
      return "bf16";
    case SAGERT_DTYPE_FP32:
      return "fp32";
    case SAGERT_DTYPE_BOOL:
      return "bool";
    default:
      return nullptr;
  }
}

const char* accuracy_name(int32_t accuracy) {
  switch (accuracy) {
    case SAGERT_ACCURACY_HIGH:
      return "high";
    case SAGERT_ACCURACY_STANDARD:
      return "standard";
    default:
      return "low";
  }
}

std::vector<const char*> flag_names(uint32_t flags) {
  constexpr const char* kNames[] = {"causal",      "lse",    "mask",   "dropout",      "grad",
                                    "no_smooth_k", "varlen", "window", "bottom_right", "quantized_kv"};
  std::vector<const char*> names;
  for (uint32_t bit = 0; bit < sizeof(kNames) / sizeof(kNames[0]); ++bit) {
    if ((flags >> bit & 1u) != 0) names.push_back(kNames[bit]);
  }
  return names;
}

std::string dtype_list(uint32_t dtypes) {
  std::string text;
  for (int32_t dtype = SAGERT_DTYPE_FP16; dtype <= SAGERT_DTYPE_FP32; ++dtype) {
    if ((dtypes >> dtype & 1u) == 0) continue;
    if (!text.empty()) text += " or ";
    text += dtype_name(dtype);
  }
  return text;
}

std::string capability_text(int32_t capability) { return concat(capability / 10, ".", capability % 10); }

}  // namespace sagert
