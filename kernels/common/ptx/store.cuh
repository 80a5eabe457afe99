// SPDX-License-Identifier: Apache-2.0
// Stores to global memory.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// 16 bytes, 16-byte aligned, as one: of a vector that came from shared memory the compiler makes four stores at times.
__device__ __forceinline__ void store16(void* place, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace sagert::ptx
