// SPDX-License-Identifier: Apache-2.0
// Loads from global memory that stay where they are written, well before their value is needed.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Of memory that the kernel does not write.
__device__ __forceinline__ float load_early(const float* pointer) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(pointer));
  return x;
}

}  // namespace sagert::ptx
