// SPDX-License-Identifier: Apache-2.0
// stmatrix (sm_90): four 8 x 8 matrices of 16-bit elements from one warp's fragments to shared memory. Lanes 8 i to
// 8 i + 7 give the addresses of matrix i's rows, 16 bytes each and 16-byte aligned.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Lane t has elements 2 (t % 4) + {0, 1} of row t / 4 of each matrix.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace sagert::ptx
