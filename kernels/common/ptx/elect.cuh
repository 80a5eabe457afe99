// SPDX-License-Identifier: Apache-2.0
// One lane of a warp (sm_90).
#pragma once

#include "integers.cuh"

namespace sagert::ptx {

// Is this the lane? The warp's lanes are together. Unlike after a comparison of the lane's index the compiler knows
// that there is only one: what takes its operands from registers that all lanes share needs no loop over lanes.
__device__ __forceinline__ bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, chosen;\n"
      "}\n"
      : "=r"(chosen));
  return chosen != 0;
}

}  // namespace sagert::ptx
