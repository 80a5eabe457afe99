// SPDX-License-Identifier: Apache-2.0
// Barriers of some of a block's warps; barrier 0 is __syncthreads'.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Waits until `threads` threads, whole warps, have come to barrier `id`.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same where warps wait at different places in the code: `bar.sync` asks for that, too, but compute-sanitizer's
// synccheck reports it.
__device__ __forceinline__ void named_barrier_anywhere(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// named_barrier, and whether any of them says so: all get the same answer.
__device__ __forceinline__ bool named_barrier_or(int id, int threads, bool mine) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "bar.red.or.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(mine)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

}  // namespace sagert::ptx
