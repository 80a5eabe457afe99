// SPDX-License-Identifier: Apache-2.0
// Elements of matrices as numbers.
#ifndef SAGERT_EMULATOR_ELEMENTS_H_
#define SAGERT_EMULATOR_ELEMENTS_H_

#include <vector>

#include "machine.h"
#include "narrow.h"

namespace emulator {

struct HalfTable {
  std::vector<float> value = std::vector<float>(65536);
  HalfTable() {
    for (uint32_t i = 0; i < 65536; ++i) value[i] = from_f16(static_cast<uint16_t>(i));
  }
};
inline const HalfTable kHalves;

inline int width_of(Element element) {
  switch (element) {
    case Element::kS4:
    case Element::kU4:
      return 4;
    case Element::kS8:
    case Element::kU8:
    case Element::kE4M3:
    case Element::kE5M2:
      return 8;
    case Element::kF16:
    case Element::kBF16:
      return 16;
    default:
      return 32;
  }
}

template <typename T>
inline T decode(Element element, uint32_t bits) {
  switch (element) {
    case Element::kS4:
      return static_cast<T>(static_cast<int32_t>(bits << 28) >> 28);
    case Element::kU4:
      return static_cast<T>(bits & 15);
    case Element::kS8:
      return static_cast<T>(static_cast<int8_t>(bits));
    case Element::kU8:
      return static_cast<T>(static_cast<uint8_t>(bits));
    case Element::kF16:
      return static_cast<T>(kHalves.value[bits & 0xffff]);
    case Element::kBF16:
      return static_cast<T>(from_bf16(static_cast<uint16_t>(bits)));
    case Element::kE4M3:
      return static_cast<T>(from_e4m3(static_cast<uint8_t>(bits)));
    case Element::kE5M2:
      return static_cast<T>(from_e5m2(static_cast<uint8_t>(bits)));
    default:
      return static_cast<T>(0);
  }
}

}  // namespace emulator

#endif  // SAGERT_EMULATOR_ELEMENTS_H_
