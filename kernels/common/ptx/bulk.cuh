// SPDX-License-Identifier: Apache-2.0
// Bulk copies by the copy engine, completing on an mbarrier.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Copies `bytes` (a multiple of 16; both addresses 16-byte aligned) to shared memory.
__device__ __forceinline__ void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   destination),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace sagert::ptx
