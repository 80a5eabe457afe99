// SPDX-License-Identifier: Apache-2.0
// What the pre-pass tells attention about a head: two integers, the first of which is 1 where K is not finite.
#pragma once

namespace sagert {

// Bits of the second one: V holds an infinity or a NaN; a channel of V is scaled to more than kLargestV.
constexpr int kVBad = 1, kVOutliers = 2;

// Largest value of most channels of V in e4m3.
constexpr float kLargestV = 0.875f;

}  // namespace sagert
