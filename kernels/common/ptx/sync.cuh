// SPDX-License-Identifier: Apache-2.0
// Named barriers and register reallocation.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Waits for `threads` arrivals at a named barrier. Its number is a constant: a dynamic one reserves all 16.
template <int barrier, int threads>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(barrier), "n"(threads) : "memory");
}

template <int barrier, int threads>
__device__ __forceinline__ void named_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(barrier), "n"(threads) : "memory");
}

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
