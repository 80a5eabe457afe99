// SPDX-License-Identifier: Apache-2.0
// ldmatrix, stmatrix and mma.sync. Lane t has row (or column) t / 4 of a fragment and, with e elements to a register,
// places e (t % 4) and on; further registers are 8 rows and 4 e places further.
#include "block.h"
#include "elements.h"

namespace emulator {
namespace {

template <typename T>
void product(const WarpLanes& warp, const Shape& shape, T (&sum)[16][8]) {
  const int per = 32 / width_of(shape.a), span = 4 * per, rows = shape.m / 8, parts = shape.k / span;
  static thread_local T a[16][64], b[64][8];
  for (int t = 0; t < 32; ++t) {
    const uint32_t* words = warp.lane[t]->words;
    const int row = t / 4, place = t % 4 * per;
    for (int r = 0; r < rows * parts; ++r) {
      for (int e = 0; e < per; ++e) {
        a[row + r % rows * 8][r / rows * span + place + e] = decode<T>(shape.a, words[r] >> e * (32 / per));
      }
    }
    words += rows * parts;
    for (int r = 0; r < parts; ++r) {
      for (int e = 0; e < per; ++e) b[r * span + place + e][row] = decode<T>(shape.b, words[r] >> e * (32 / per));
    }
  }
  for (int i = 0; i < shape.m; ++i) {
    T line[8];
    std::memcpy(line, sum[i], sizeof(line));
    for (int k = 0; k < shape.k; ++k) {
      for (int j = 0; j < 8; ++j) line[j] += a[i][k] * b[k][j];
    }
    std::memcpy(sum[i], line, sizeof(line));
  }
}

// Where lane t has element `e` of its accumulators.
template <typename T>
T& element(T (&sum)[16][8], int t, int e) {
  return sum[t / 4 + e / 2 * 8][t % 4 * 2 + e % 2];
}

}  // namespace

void multiply(const WarpLanes& warp, const Shape& shape) {
  const int per = 32 / width_of(shape.a), parts = shape.k / (4 * per), rows = shape.m / 8;
  const int first = rows * parts + parts, count = 2 * rows;  // the accumulators' first word, elements per lane
  if (shape.c == Element::kS32) {
    int32_t sum[16][8] = {};
    for (int t = 0; t < 32; ++t) {
      for (int e = 0; e < count; ++e) element(sum, t, e) = static_cast<int32_t>(warp.lane[t]->words[first + e]);
    }
    product(warp, shape, sum);
    for (int t = 0; t < 32; ++t) {
      for (int e = 0; e < count; ++e) warp.lane[t]->words[e] = static_cast<uint32_t>(element(sum, t, e));
    }
    return;
  }
  double sum[16][8] = {};
  const bool half = shape.c == Element::kF16;
  for (int t = 0; t < 32; ++t) {
    const uint32_t* words = warp.lane[t]->words + first;
    for (int e = 0; e < count; ++e) {
      element(sum, t, e) =
          half ? from_f16(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16)) : bits_of<float>(words[e]);
    }
  }
  product(warp, shape, sum);
  for (int t = 0; t < 32; ++t) {
    uint32_t* words = warp.lane[t]->words;
    for (int e = 0; e < count; ++e) {
      if (half) {
        const uint32_t bits = to_f16(element(sum, t, e));
        words[e / 2] = e % 2 == 0 ? bits : words[e / 2] | bits << 16;
      } else {
        words[e] = bits_of<uint32_t>(static_cast<float>(element(sum, t, e)));
      }
    }
  }
}

void move_matrices(const WarpLanes& warp, Together what) {
  const bool stores = what >= Together::kStoreMatrices1;
  const int kind = static_cast<int>(what) - static_cast<int>(stores ? Together::kStoreMatrices1 : Together::kMatrices1);
  const bool transposed = kind >= 3;
  const int count = 1 << kind % 3;
  uint8_t* row[kWarp];
  for (int i = 0; i < 8 * count; ++i) {
    Lane& lane = *warp.lane[i];
    row[i] = shared_at(lane, lane.site, lane.words[0], 16);
  }
  for (int matrix = 0; matrix < count; ++matrix) {
    for (int t = 0; t < 32; ++t) {
      uint32_t& word = warp.lane[t]->words[matrix + stores];
      uint32_t found = 0;
      for (int e = 0; e < 2; ++e) {
        const int along = t % 4 * 2 + e, across = t / 4;
        uint8_t* place = row[8 * matrix + (transposed ? along : across)] + 2 * (transposed ? across : along);
        if (stores) {
          store<uint16_t>(place, static_cast<uint16_t>(word >> 16 * e));
        } else {
          found |= static_cast<uint32_t>(load<uint16_t>(place)) << 16 * e;
        }
      }
      if (!stores) word = found;
    }
  }
}

}  // namespace emulator
