// SPDX-License-Identifier: Apache-2.0
// Leading keys: the first ones, attention sinks in most models (StreamingLLM, arXiv 2309.17453), whose V is often far
// smaller than that of others. Of int8_int8 their P and V are not quantized: bytes of P that span them have nothing
// left for the other keys of their block, nor have bytes of V, scaled by those, much for them.
#pragma once

#include "values.cuh"

namespace sagert {

constexpr int kLeadingKeys = kV == V::kInt8 ? 4 : 0;

// What is added to INT8 V, so that its products with P are not negative, and what its scales are multiplied with: the
// products are taken as bits of fp32, which makes them subnormal numbers (consumer_int8.cuh).
constexpr int kVRaise = 128;
constexpr float kVLift = 0x1p100f;
// Channels whose INT8 V shares a scale in most blocks: one group for each lane of a quad.
constexpr int kVGroups = 4;
// Where scale i of a block stands that a lane of a quad needs, which is that of its pair in tile i of 8 channels: the
// groups' first ones, then their second ones.
constexpr int scale_place(int channels, int i) {
  const int tiles = channels / 8 / kVGroups;  // of a group
  return i % tiles * kVGroups + i / tiles;
}

// Words of a head behind VMean: V's means, of INT8 V the channels' units, in fp32; then V of the leading keys less
// means, in these units, in 16 bits.
constexpr int leading_at(int channels) { return channels * (kV == V::kInt8 ? 2 : 1); }
constexpr int mean_words(int channels) { return leading_at(channels) + kLeadingKeys * channels / 2; }

}  // namespace sagert
