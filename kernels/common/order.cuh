// SPDX-License-Identifier: Apache-2.0
// The order of causal tiles, which differ in length.
#pragma once

namespace sagert {

// A head and the position of a tile among the head's.
struct Place {
  int head;  // b * heads_q + h
  int position;
};

// The longest tiles first, among `section` heads whose keys and values stay in L2 together. Heads that make no whole
// section come before the others: at the end their few tiles would not keep all multiprocessors busy.
__device__ __forceinline__ Place longest_first(int index, int tiles, int section, int heads_total) {
  const int short_section = heads_total % section;
  int first = 0, heads = short_section;
  if (index >= short_section * tiles) {
    first = short_section + (index - short_section * tiles) / (section * tiles) * section;
    heads = section;
  }
  const int rest = index - first * tiles;
  return {first + rest % heads, tiles - 1 - rest / heads};
}

}  // namespace sagert
