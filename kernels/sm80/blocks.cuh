// SPDX-License-Identifier: Apache-2.0
// Blocks of keys: tiles of K8 and V8 have one each.
#pragma once

#include "quantize.cuh"
#include "values.cuh"

namespace sagert {

// Neighbouring blocks that share K's scales and V's: a step of attention has all of their keys, and what comes once per
// step, as adding products of INT8 to O does, comes half as often with two.
constexpr int kScaleBlocks = SCALE_BLOCKS;
static_assert(kScaleBlocks == 1 || (kScaleBlocks == 2 && kV == V::kInt8 && !kInt4), "written for INT8 alone");

}  // namespace sagert
