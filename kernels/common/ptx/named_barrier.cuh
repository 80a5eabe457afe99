// SPDX-License-Identifier: Apache-2.0
// Barriers of some of a block's warps; barrier 0 is __syncthreads'.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Waits until `threads` threads, whole warps, have come to barrier `id`.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace sagert::ptx
