// SPDX-License-Identifier: Apache-2.0
// Kernel parameters and launches. A family names each parameter as it packs it, so that the same code also gives the
// parameter list that the kernel's signature is compared with.
#ifndef SAGERT_HOST_LAUNCH_H_
#define SAGERT_HOST_LAUNCH_H_

#include <cstdint>
#include <cstring>
#include <string>

#include "driver.h"
#include "table.h"

namespace sagert {

// Parameters of one launch, on the stack.
class KernelParameters {
 public:
  static constexpr int kCapacity = 48;

  void pointer(const char*, const void* value) { add(&value, sizeof(value)); }
  void i32(const char*, int32_t value) { add(&value, sizeof(value)); }
  void i64(const char*, int64_t value) { add(&value, sizeof(value)); }
  void fp32(const char*, float value) { add(&value, sizeof(value)); }
  // Not copied: the map must outlive the launch.
  void tensormap(const char*, const CUtensorMap& map) {
    if (void** address = next()) *address = const_cast<CUtensorMap*>(&map);
  }
  // The compiler's own trailing 64-bit parameters, always 0.
  void hidden(int32_t count) {
    for (int32_t i = 0; i < count; ++i) i64("", 0);
  }

  bool overflowed() const { return overflowed_; }
  void** data() { return addresses_; }

 private:
  void** next() {
    overflowed_ |= count_ == kCapacity;
    return overflowed_ ? nullptr : &addresses_[count_++];
  }
  void add(const void* value, size_t size) {
    uint64_t* slot = &values_[count_];
    if (void** address = next()) *address = std::memcpy(slot, value, size);
  }

  uint64_t values_[kCapacity];
  void* addresses_[kCapacity];
  int count_ = 0;
  bool overflowed_ = false;
};

// Writes the parameter list instead of values: "K:* seqlen_k:i32 ...".
class ParameterList {
 public:
  void pointer(const char* name, const void*) { add(name, "*"); }
  void i32(const char* name, int32_t) { add(name, "i32"); }
  void i64(const char* name, int64_t) { add(name, "i64"); }
  void fp32(const char* name, float) { add(name, "fp32"); }
  void tensormap(const char* name, const CUtensorMap&) { add(name, "tensormap"); }
  const std::string& text() const { return text_; }

 private:
  void add(const char* name, const char* type) {
    if (!text_.empty()) text_ += ' ';
    text_ = text_ + name + ':' + type;
  }

  std::string text_;
};

// Whether a kernel's signature is the list, whatever its pointers point to.
bool matches_signature(const std::string& list, const char* signature);

// Type of a pointer parameter in a signature, such as "fp8e4nv"; empty when it has none of that name.
std::string pointee(const char* signature, const char* name);

// Enqueues a kernel of `kKernels` on the stream. Its grid is `blocks` wide and `parts` high. `may_overlap`: if its
// launch is a dependent one it may overlap what is in front of it in the stream, of whose results it reads none before
// its own wait. `cluster`: blocks per cluster, at most the kernel's own number, which 0 stands for.
void launch(const Driver& driver, CUkernel kernel, const KernelEntry& entry, int64_t blocks,
            KernelParameters& parameters, void* stream, bool may_overlap = false, int32_t cluster = 0,
            int64_t parts = 1);

// Blocks of a kernel whose blocks take `tiles` in turns: no more than the device runs at a time, whole clusters.
int64_t persistent_blocks(const Device& device, const KernelEntry& entry, int64_t tiles);

}  // namespace sagert

#endif  // SAGERT_HOST_LAUNCH_H_
