// SPDX-License-Identifier: Apache-2.0
// Leading keys: the first ones, attention sinks in most models (StreamingLLM, arXiv 2309.17453), whose V is often far
// smaller than that of others. Of int8_int8 their P and V are not quantized: bytes of P that span them have nothing
// left for the other keys of their block, nor have bytes of V, scaled by those, much for them.
#pragma once

#include "values.cuh"

namespace sagert {

constexpr int kLeadingKeys = kV == V::kInt8 ? 4 : 0;

// Words of a head behind VMean: V's means, of INT8 V the channels' units, in fp32; then V of the leading keys less
// means, in these units, in 16 bits.
constexpr int leading_at(int channels) { return channels * (kV == V::kInt8 ? 2 : 1); }
constexpr int mean_words(int channels) { return leading_at(channels) + kLeadingKeys * channels / 2; }

}  // namespace sagert
