// SPDX-License-Identifier: Apache-2.0
// A family is the host code that launches rows of one design: its workspace, its pre-pass, its parameters.
#ifndef SAGERT_HOST_FAMILY_H_
#define SAGERT_HOST_FAMILY_H_

#include <cstdint>

#include "driver.h"
#include "sagert.h"

namespace sagert {

// Which kernels to launch.
enum Phase : uint32_t {
  kPrepareKv = 1,
  kPrepareQ = 2,
  kAttend = 4,
  kPrepass = kPrepareKv | kPrepareQ,
  kWhole = kPrepass | kAttend
};

// What quantized K and V take.
struct KvSize {
  int64_t bytes;
  bool reads_v;  // attention reads V itself, too
};

class Family {
 public:
  virtual ~Family() = default;
  // Bytes of workspace.
  virtual uint64_t workspace_size(const Device& device, const sagert_attention_args& args, int32_t variant) const = 0;
  // Of a call with FLAG_QUANTIZED_KV; depends on K and V, the row and the device alone.
  virtual KvSize kv_size(const Device& device, const sagert_attention_args& args, int32_t variant) const = 0;
  // Enqueues the kernels. The arguments have been checked and the device's context is current. With FLAG_QUANTIZED_KV
  // kPrepareKv writes args.kv and the other phases read it.
  virtual void run(const Driver& driver, const Device& device, const sagert_attention_args& args, int32_t variant,
                   Phase phase) const = 0;
};

// Throws Error (INTERNAL) for a name that no family has.
const Family& find_family(const char* name);

}  // namespace sagert

#endif  // SAGERT_HOST_FAMILY_H_
