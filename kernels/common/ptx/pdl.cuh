// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Lets the dependent grid start once every block of this one has said so or has ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the grids that this one depends on have ended and their writes are visible.
__device__ __forceinline__ void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Loads of what those grids have written, which stay behind that wait. __ldg does not: the compiler takes its memory to
// be constant, and moved a load in front of the wait where no branch stood between.
__device__ __forceinline__ float load_prerequisite(const float* pointer) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(pointer) : "memory");
  return x;
}

__device__ __forceinline__ int2 load_prerequisite(const int2* pointer) {
  int2 x;
  asm volatile("ld.global.v2.s32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(pointer) : "memory");
  return x;
}

}  // namespace sagert::ptx
