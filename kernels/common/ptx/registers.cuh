// SPDX-License-Identifier: Apache-2.0
// Register reallocation between warpgroups.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Registers per thread of this warpgroup from here on.
template <int count>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace sagert::ptx
