// SPDX-License-Identifier: Apache-2.0
// wgmma (sm_90a): D[64, N] = A[64, K] * B[K, N] (+ D), asynchronous, issued by the 4 warps of a warpgroup.
//
// A thread of warp w, lane t holds of D rows 16 w + t / 4 and that + 8: d[4 j + 0, 1] are columns 8 j + 2 (t % 4) + 0,
// 1 of the first row, d[4 j + 2, 3] those of the second. A comes from registers (a[0..3]) or shared memory, B from
// shared memory.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Orders register and shared-memory accesses of this warpgroup before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` committed groups are unfinished.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving uses of registers that a wgmma reads or writes across this point: of the first
// `count`.
template <int count, int n>
__device__ __forceinline__ void pin_first(int32_t (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int n>
__device__ __forceinline__ void pin(int32_t (&registers)[n]) {
  pin_first<n>(registers);
}

template <int n>
__device__ __forceinline__ void pin(uint32_t (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int n>
__device__ __forceinline__ void pin(float (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// clang-format off
#define SAGERT_WGMMA_D18 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17"
#define SAGERT_WGMMA_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define SAGERT_WGMMA_D34 SAGERT_WGMMA_D32 ", %32, %33"
#define SAGERT_WGMMA_D36 SAGERT_WGMMA_D34 ", %34, %35"
#define SAGERT_WGMMA_D64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SAGERT_WGMMA_D68 SAGERT_WGMMA_D64 ", %64, %65, %66, %67"
#define SAGERT_WGMMA_D96                                                                                               \
  SAGERT_WGMMA_D68                                                                                                     \
  ", %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "   \
  "%90, %91, %92, %93, %94, %95"
#define SAGERT_WGMMA_OPERANDS18(C, d) \
  C(d[0]), C(d[1]), C(d[2]), C(d[3]), C(d[4]), C(d[5]), C(d[6]), C(d[7]), C(d[8]), \
  C(d[9]), C(d[10]), C(d[11]), C(d[12]), C(d[13]), C(d[14]), C(d[15]), C(d[16]), C(d[17])
#define SAGERT_WGMMA_OPERANDS32(C, d) \
  C(d[0]), C(d[1]), C(d[2]), C(d[3]), C(d[4]), C(d[5]), C(d[6]), C(d[7]), \
  C(d[8]), C(d[9]), C(d[10]), C(d[11]), C(d[12]), C(d[13]), C(d[14]), C(d[15]), \
  C(d[16]), C(d[17]), C(d[18]), C(d[19]), C(d[20]), C(d[21]), C(d[22]), C(d[23]), \
  C(d[24]), C(d[25]), C(d[26]), C(d[27]), C(d[28]), C(d[29]), C(d[30]), C(d[31])
#define SAGERT_WGMMA_OPERANDS64(C, d) \
  C(d[0]), C(d[1]), C(d[2]), C(d[3]), C(d[4]), C(d[5]), C(d[6]), C(d[7]), \
  C(d[8]), C(d[9]), C(d[10]), C(d[11]), C(d[12]), C(d[13]), C(d[14]), C(d[15]), \
  C(d[16]), C(d[17]), C(d[18]), C(d[19]), C(d[20]), C(d[21]), C(d[22]), C(d[23]), \
  C(d[24]), C(d[25]), C(d[26]), C(d[27]), C(d[28]), C(d[29]), C(d[30]), C(d[31]), \
  C(d[32]), C(d[33]), C(d[34]), C(d[35]), C(d[36]), C(d[37]), C(d[38]), C(d[39]), \
  C(d[40]), C(d[41]), C(d[42]), C(d[43]), C(d[44]), C(d[45]), C(d[46]), C(d[47]), \
  C(d[48]), C(d[49]), C(d[50]), C(d[51]), C(d[52]), C(d[53]), C(d[54]), C(d[55]), \
  C(d[56]), C(d[57]), C(d[58]), C(d[59]), C(d[60]), C(d[61]), C(d[62]), C(d[63])
#define SAGERT_WGMMA_OPERANDS34(C, d) \
  SAGERT_WGMMA_OPERANDS32(C, d), C(d[32]), C(d[33])
#define SAGERT_WGMMA_OPERANDS36(C, d) \
  SAGERT_WGMMA_OPERANDS34(C, d), C(d[34]), C(d[35])
#define SAGERT_WGMMA_OPERANDS68(C, d) \
  SAGERT_WGMMA_OPERANDS64(C, d), C(d[64]), C(d[65]), C(d[66]), C(d[67])
#define SAGERT_WGMMA_OPERANDS96(C, d) \
  SAGERT_WGMMA_OPERANDS68(C, d), C(d[68]), C(d[69]), C(d[70]), C(d[71]), C(d[72]), C(d[73]), C(d[74]), C(d[75]), \
  C(d[76]), C(d[77]), C(d[78]), C(d[79]), C(d[80]), C(d[81]), C(d[82]), C(d[83]), C(d[84]), C(d[85]), C(d[86]), \
  C(d[87]), C(d[88]), C(d[89]), C(d[90]), C(d[91]), C(d[92]), C(d[93]), C(d[94]), C(d[95])
// clang-format on
#define SAGERT_ACC_R(x) "+r"(x)
#define SAGERT_NEW_R(x) "=r"(x)
#define SAGERT_ACC_F(x) "+f"(x)

// Scores: s8 A and B, int32 D, K = 32. Without `accumulate` what D held is dead, and said to be: as an input it would
// make ptxas serialize the wgmma in flight (C7511).
#define SAGERT_WGMMA_S8_AS(constraint, columns, count, a0, b0, flag)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                           \
               ", 0;\n"                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" SAGERT_WGMMA_D##count \
               "}, %" #a0 ", %" #b0 ", p;\n}\n"                                                     \
               : SAGERT_WGMMA_OPERANDS##count(constraint, d)                                        \
               : "l"(a), "l"(b), "n"(accumulate))
#define SAGERT_WGMMA_S8(columns, count, a0, b0, flag)                                     \
  template <int accumulate>                                                               \
  __device__ __forceinline__ void wgmma_s8(int32_t (&d)[count], uint64_t a, uint64_t b) { \
    if constexpr (accumulate != 0) {                                                      \
      SAGERT_WGMMA_S8_AS(SAGERT_ACC_R, columns, count, a0, b0, flag);                     \
    } else {                                                                              \
      SAGERT_WGMMA_S8_AS(SAGERT_NEW_R, columns, count, a0, b0, flag);                     \
    }                                                                                     \
  }

SAGERT_WGMMA_S8(128, 64, 64, 65, 66)
SAGERT_WGMMA_S8(192, 96, 96, 97, 98)

#undef SAGERT_WGMMA_S8
#undef SAGERT_WGMMA_S8_AS

// P V: u8 A (registers), u8 B (K-major), int32 D, K = 32; `accumulate` as in wgmma_s8.
#define SAGERT_WGMMA_U8U8_AS(constraint, columns, count, a0, a1, a2, a3, b0, flag)                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                           \
               ", 0;\n"                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.u8.u8 {" SAGERT_WGMMA_D##count \
               "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", p;\n}\n"                     \
               : SAGERT_WGMMA_OPERANDS##count(constraint, d)                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate))
#define SAGERT_WGMMA_U8U8(columns, count, a0, a1, a2, a3, b0, flag)                                \
  template <int accumulate>                                                                        \
  __device__ __forceinline__ void wgmma_u8u8(int32_t (&d)[count], const uint32_t* a, uint64_t b) { \
    if constexpr (accumulate != 0) {                                                               \
      SAGERT_WGMMA_U8U8_AS(SAGERT_ACC_R, columns, count, a0, a1, a2, a3, b0, flag);                \
    } else {                                                                                       \
      SAGERT_WGMMA_U8U8_AS(SAGERT_NEW_R, columns, count, a0, a1, a2, a3, b0, flag);                \
    }                                                                                              \
  }

SAGERT_WGMMA_U8U8(64, 32, 32, 33, 34, 35, 36, 37)
SAGERT_WGMMA_U8U8(128, 64, 64, 65, 66, 67, 68, 69)

#undef SAGERT_WGMMA_U8U8
#undef SAGERT_WGMMA_U8U8_AS

// D += P V with e4m3 A (registers) and e4m3 B (K-major), K = 32. D in fp32 is kept with about 14 bits. D in fp16 is
// rounded to nearest for each K; d[2 j] are columns 8 j + 2 (t % 4) + 0, 1 of the first row, d[2 j + 1] those of the
// second.
#define SAGERT_WGMMA_E4M3(type, sums, constraint, columns, count, a0, a1, a2, a3, b0, flag)                    \
  __device__ __forceinline__ void wgmma_e4m3(type(&d)[count], const uint32_t* a, uint64_t b) {                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                                    \
                 ", 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32." sums ".e4m3.e4m3 {" SAGERT_WGMMA_D##count \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", p, 1, 1;\n}\n"                        \
                 : SAGERT_WGMMA_OPERANDS##count(constraint, d)                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));                                \
  }

SAGERT_WGMMA_E4M3(float, "f32", SAGERT_ACC_F, 72, 36, 36, 37, 38, 39, 40, 41)
SAGERT_WGMMA_E4M3(float, "f32", SAGERT_ACC_F, 136, 68, 68, 69, 70, 71, 72, 73)
SAGERT_WGMMA_E4M3(uint32_t, "f16", SAGERT_ACC_R, 72, 18, 18, 19, 20, 21, 22, 23)
SAGERT_WGMMA_E4M3(uint32_t, "f16", SAGERT_ACC_R, 136, 34, 34, 35, 36, 37, 38, 39)

// D += P V with 16-bit A (registers) and B (channels contiguous), K = 16.
#define SAGERT_WGMMA_IO(type, columns, count, a0, a1, a2, a3, b0, flag)                                             \
  __device__ __forceinline__ void wgmma_##type(float (&d)[count], const uint32_t* a, uint64_t b) {                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #flag                                                         \
                 ", 0;\n"                                                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type " {" SAGERT_WGMMA_D##count \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", p, 1, 1, 1;\n}\n"                          \
                 : SAGERT_WGMMA_OPERANDS##count(SAGERT_ACC_F, d)                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));                                     \
  }

SAGERT_WGMMA_IO(f16, 72, 36, 36, 37, 38, 39, 40, 41)
SAGERT_WGMMA_IO(f16, 128, 64, 64, 65, 66, 67, 68, 69)
SAGERT_WGMMA_IO(bf16, 72, 36, 36, 37, 38, 39, 40, 41)
SAGERT_WGMMA_IO(bf16, 128, 64, 64, 65, 66, 67, 68, 69)

#undef SAGERT_WGMMA_E4M3
#undef SAGERT_WGMMA_IO
#undef SAGERT_WGMMA_D18
#undef SAGERT_WGMMA_D32
#undef SAGERT_WGMMA_D34
#undef SAGERT_WGMMA_D36
#undef SAGERT_WGMMA_D64
#undef SAGERT_WGMMA_D68
#undef SAGERT_WGMMA_D96
#undef SAGERT_WGMMA_OPERANDS18
#undef SAGERT_WGMMA_OPERANDS32
#undef SAGERT_WGMMA_OPERANDS34
#undef SAGERT_WGMMA_OPERANDS36
#undef SAGERT_WGMMA_OPERANDS64
#undef SAGERT_WGMMA_OPERANDS68
#undef SAGERT_WGMMA_OPERANDS96
#undef SAGERT_ACC_R
#undef SAGERT_NEW_R
#undef SAGERT_ACC_F

}  // namespace sagert::ptx
