// SPDX-License-Identifier: Apache-2.0
// The order of causal tiles, which differ in length.
#pragma once

namespace sagert {

// A head and the position of a tile among the head's.
struct Place {
  int head;  // b * heads_q + h
  int position;
};

// The longest tiles first, among `section` heads whose keys and values stay in L2 together.
__device__ __forceinline__ Place longest_first(int index, int tiles, int section, int heads_total) {
  const int first = index / (section * tiles) * section;
  const int heads = min(section, heads_total - first);
  const int rest = index - first * tiles;
  return {first + rest % heads, tiles - 1 - rest / heads};
}

}  // namespace sagert
