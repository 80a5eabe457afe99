// SPDX-License-Identifier: Apache-2.0
// ldmatrix: four 8 x 8 matrices of 16-bit elements from shared memory to one warp's fragments. Lanes 8 i to 8 i + 7
// give the addresses of matrix i's rows, 16 bytes each and 16-byte aligned.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Lane t gets elements 2 (t % 4) + {0, 1} of row t / 4 of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

}  // namespace sagert::ptx
