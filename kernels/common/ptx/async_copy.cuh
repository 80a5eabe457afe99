// SPDX-License-Identifier: Apache-2.0
// Copies to shared memory that a thread starts and later waits for, without a register or a barrier.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Copies 16 bytes, or writes zeros; both addresses 16-byte aligned. `source` must be valid in either case.
__device__ __forceinline__ void async_copy16(uint32_t destination, const void* source, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(copy ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void async_copy16(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

// What a thread has started since its last commit is a group.
__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` groups of this thread are unfinished.
template <int pending>
__device__ __forceinline__ void async_copy_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Arrives at a barrier when the copies of this thread are there. The barrier's count has a place for each such thread.
__device__ __forceinline__ void async_copy_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace sagert::ptx
