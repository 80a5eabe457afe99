// SPDX-License-Identifier: Apache-2.0
// Families whose every call is a plan, made of its arguments and of what the table says of the variant's kernels.
#ifndef SAGERT_HOST_FAMILIES_PLANNED_H_
#define SAGERT_HOST_FAMILIES_PLANNED_H_

#include <cstdint>
#include <cstring>
#include <vector>

#include "../bundle.h"
#include "../driver.h"
#include "../error.h"
#include "../family.h"
#include "../table.h"
#include "common.h"
#include "sagert.h"

namespace sagert {

// Traits are read once, when the library is loaded; `defect` says, unless it is empty, how the build and this library
// disagree. A Plan has `memory` and reads_v(), and refers to the arguments.
template <typename Traits, typename Plan>
class PlannedFamily : public Family {
 public:
  uint64_t workspace_size(const Device& device, const sagert_attention_args& args, int32_t variant) const override {
    return static_cast<uint64_t>(plan(device, args, variant).memory.workspace_size);
  }

  KvSize kv_size(const Device& device, const sagert_attention_args& args, int32_t variant) const override {
    const Plan made = plan(device, args, variant);
    return {made.memory.kv_size, made.reads_v()};
  }

  void run(const Driver& driver, const Device& device, const sagert_attention_args& args, int32_t variant,
           Phase phase) const override {
    Plan made = plan(device, args, variant);
    check_memory(args, made.memory, phase);
    enqueue(driver, device, made, kVariants[variant], traits(variant), phase);
  }

 protected:
  PlannedFamily(const char* family, Traits (*read_traits)(const VariantEntry& variant)) {
    for (int32_t i = 0; i < kVariantCount; ++i) {
      const bool mine = std::strcmp(kRows[kVariants[i].row].family, family) == 0;
      traits_.push_back(mine ? read_traits(kVariants[i]) : Traits());
    }
  }

 private:
  virtual Plan make_plan(const Device& device, const sagert_attention_args& args, const VariantEntry& variant,
                         const Traits& traits) const = 0;
  virtual void enqueue(const Driver& driver, const Device& device, Plan& plan, const VariantEntry& variant,
                       const Traits& traits, Phase phase) const = 0;

  Plan plan(const Device& device, const sagert_attention_args& args, int32_t variant) const {
    return make_plan(device, args, kVariants[variant], traits(variant));
  }

  const Traits& traits(int32_t variant) const {
    const Traits& traits = traits_[static_cast<size_t>(variant)];
    if (!traits.defect.empty()) throw Error(SAGERT_ERROR_INTERNAL, traits.defect);
    return traits;
  }

  std::vector<Traits> traits_;
};

// Whether a kernel of that role runs in a phase.
inline bool in_phase(int role, Phase phase) {
  return (phase & (role > kQuantizeQ ? kAttend : role == kQuantizeQ ? kPrepareQ : kPrepareKv)) != 0;
}

// Calls launch(role, kernel) for the roles that are needed, in their order. All kernels are made ready before the first
// is launched: a failure leaves nothing half done.
template <size_t count, typename Needed, typename Launch>
void launch_roles(const Driver& driver, const Device& device, const VariantEntry& variant, const int (&roles)[count],
                  Needed needed, Launch launch) {
  CUkernel kernels[kRoleCount] = {};
  for (int role : roles) {
    if (needed(role)) kernels[role] = ready_kernel(driver, device, variant.kernels[role]);
  }
  for (int role : roles) {
    if (needed(role)) launch(role, kernels[role]);
  }
}

}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_PLANNED_H_
