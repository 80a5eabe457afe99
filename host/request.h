// SPDX-License-Identifier: Apache-2.0
// Validation: what is malformed is refused here, naming the argument, its value and what is accepted.
#ifndef SAGERT_HOST_REQUEST_H_
#define SAGERT_HOST_REQUEST_H_

#include <cstdint>

#include "error.h"
#include "sagert.h"

namespace sagert {

// Fails unless the caller's struct is at least as large as the first version of it.
template <typename Struct>
void check_struct(const Struct* value, const char* name) {
  if (value == nullptr) fail_argument(name, " is NULL");
  if (value->struct_size < sizeof(Struct)) {
    fail_argument(name, ".struct_size is ", value->struct_size, ", but ", name, " has at least ", sizeof(Struct),
                  " bytes; set it to sizeof(*", name, ") and compile against this library's sagert.h");
  }
}

void check_request(const sagert_request* request);
void check_device(const sagert_device* device);

inline bool has_quantized_kv(const sagert_attention_args& args) { return (args.flags & SAGERT_FLAG_QUANTIZED_KV) != 0; }

enum class Stage { kPlan, kRun };

// Checks what chooses a row.
void check_content(const sagert_request& request);
// Checks the rest of the arguments but the workspace. At kPlan null pointers are accepted: only layouts matter.
void check_operands(const sagert_attention_args& args, Stage stage);
void check_workspace(const sagert_attention_args& args, uint64_t needed);
void check_kv(const sagert_attention_args& args, uint64_t needed);

// The arguments of a call that quantizes K and V alone, checked: what it must not depend on is left out.
sagert_attention_args kv_args(const sagert_attention_args* args, Stage stage);

// The part of the arguments that chooses a row.
sagert_request request_of(const sagert_attention_args& args);

}  // namespace sagert

#endif  // SAGERT_HOST_REQUEST_H_
