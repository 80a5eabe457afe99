// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch.
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Lets the dependent grid start once every block of this one has said so or has ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the grids that this one depends on have ended and their writes are visible.
__device__ __forceinline__ void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace sagert::ptx
