// SPDX-License-Identifier: Apache-2.0
// Bulk copies from shared to global memory by the copy engine. Writers of the source call fence_async_shared()
// (bulk.cuh) before the barrier that precedes the copy. Groups belong to the thread that commits them.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Copies `bytes` (a multiple of 16; both addresses 16-byte aligned) from shared memory.
__device__ __forceinline__ void bulk_store(void* destination, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `pending` groups still have to read their source.
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Waits until at most `pending` groups are unfinished.
template <int pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace sagert::ptx
