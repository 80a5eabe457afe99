// SPDX-License-Identifier: Apache-2.0
// Bulk copies by the copy engine, completing on an mbarrier.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Copies `bytes` (a multiple of 16; both addresses 16-byte aligned) to shared memory.
__device__ __forceinline__ void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// A tensor map, as the driver encodes it; a kernel has it as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  char bytes[128];
};

// Copies the map's box at these coordinates, innermost first, to shared memory.
__device__ __forceinline__ void bulk_load_tensor(uint32_t destination, const TensorMap* map, int x0, int x1, int x2,
                                                 int x3, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(destination),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}

// Orders this thread's writes to shared memory before what the tensor cores and the copy engine read of it later.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace sagert::ptx
