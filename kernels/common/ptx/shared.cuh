// SPDX-License-Identifier: Apache-2.0
// Addresses in shared memory.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace sagert::ptx
