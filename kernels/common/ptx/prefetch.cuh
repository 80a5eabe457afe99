// SPDX-License-Identifier: Apache-2.0
// Loads that only fill a cache.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Brings the line of global memory that holds `pointer` to L1.
__device__ __forceinline__ void prefetch_l1(const void* pointer) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(pointer));
}

}  // namespace sagert::ptx
