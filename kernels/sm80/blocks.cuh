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

// Are there even blocks of V? Their channels have one factor, behind units that are the head's; the others have scales
// of their own, in these units. In blocks of odd numbers V8 is -V then.
constexpr bool kEvenV = EVEN_V != 0;
static_assert(!kEvenV || (kScaleBlocks == 1 && kV == V::kInt8 && !kInt4), "written for INT8 alone");
constexpr float kEvenSpread = 2.5f;    // of an even block's channels: the largest scale beside their root mean square
constexpr int kSinkKeys = 4;           // of a head's first ones
constexpr float kSinkLoudness = 0.5f;  // of one that is no attention sink: its largest value beside the block's

}  // namespace sagert
