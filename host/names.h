// SPDX-License-Identifier: Apache-2.0
// Names of the C ABI's enumerations, as people and Python write them.
#ifndef SAGERT_HOST_NAMES_H_
#define SAGERT_HOST_NAMES_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sagert {

constexpr uint32_t kAllFlags = 1023;  // every SAGERT_FLAG_*

const char* precision_name(int32_t precision);  // null when unknown
const char* dtype_name(int32_t dtype);          // null when unknown
const char* accuracy_name(int32_t accuracy);
std::vector<const char*> flag_names(uint32_t flags);
std::string dtype_list(uint32_t dtypes);          // "fp16 or bf16"
std::string capability_text(int32_t capability);  // "9.0"

}  // namespace sagert

#endif  // SAGERT_HOST_NAMES_H_
