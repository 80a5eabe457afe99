// SPDX-License-Identifier: Apache-2.0
// mma.sync: D[16, 8] = A[16, K] * B[K, 8] + C, of one warp.
//
// Lane t holds of C and D row t / 4, columns 2 (t % 4) + {0, 1} in d[0, 1], and the same of row t / 4 + 8 in d[2, 3].
// Of A it holds, with e elements to a register, row t / 4 (a[0], a[2]) and t / 4 + 8 (a[1], a[3]), k = e (t % 4) and on
// (a[0], a[1]) and K / 2 further (a[2], a[3]); of B column t / 4, k likewise (b0, b1).
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// clang-format off
#define SAGERT_MMA(name, instruction, type, constraint)                                                               \
  __device__ __forceinline__ void name(type (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,                \
                                       const type (&c)[4]) {                                                          \
    asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                            \
        : "=" constraint(d[0]), "=" constraint(d[1]), "=" constraint(d[2]), "=" constraint(d[3])                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), constraint(c[0]), constraint(c[1]),           \
          constraint(c[2]), constraint(c[3]));                                                                        \
  }

SAGERT_MMA(mma_s8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", int32_t, "r")
SAGERT_MMA(mma_s4, "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", int32_t, "r")
SAGERT_MMA(mma_u8s8, "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", int32_t, "r")
SAGERT_MMA(mma_e4m3, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "f")
SAGERT_MMA(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", float, "f")
SAGERT_MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
#undef SAGERT_MMA

// With C and D in fp16, two elements to a register.
#define SAGERT_MMA_HALF(name, instruction)                                                                            \
  __device__ __forceinline__ void name(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,            \
                                       const uint32_t (&c)[2]) {                                                      \
    asm(instruction " {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %9};"                                                \
        : "=r"(d[0]), "=r"(d[1])                                                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));                        \
  }

SAGERT_MMA_HALF(mma_f16_half, "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16")
SAGERT_MMA_HALF(mma_e4m3_half, "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16")
#undef SAGERT_MMA_HALF
// clang-format on

}  // namespace sagert::ptx
