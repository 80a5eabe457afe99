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

// threadIdx.x, read anew: kept over a loop it may take a register that is not there.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// gridDim.x and gridDim.y, likewise.
__device__ __forceinline__ uint32_t grid_width() {
  uint32_t width;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(width));
  return width;
}

__device__ __forceinline__ uint32_t grid_height() {
  uint32_t height;
  asm volatile("mov.u32 %0, %%nctaid.y;" : "=r"(height));
  return height;
}

}  // namespace sagert::ptx
