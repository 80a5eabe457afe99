// SPDX-License-Identifier: Apache-2.0
// Loads from global memory that stay where they are written.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Of memory that the kernel does not write, well before the value is needed.
__device__ __forceinline__ float load_early(const float* pointer) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(pointer));
  return x;
}

// Of memory that other threads of the grid change.
__device__ __forceinline__ int load_current(const int* pointer) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(pointer) : "memory");
  return x;
}

}  // namespace sagert::ptx
