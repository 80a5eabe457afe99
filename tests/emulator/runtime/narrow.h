// SPDX-License-Identifier: Apache-2.0
// fp16, bf16, e4m3 and e5m2 as bits, converted to and from float. Rounding is to nearest even unless said otherwise.
#ifndef SAGERT_EMULATOR_NARROW_H_
#define SAGERT_EMULATOR_NARROW_H_

#include <cstdint>
#include <cstring>

namespace emulator {

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// A float as a narrower format's bits without the sign. `least`: exponent of its smallest normal number.
inline uint32_t narrow_magnitude(float magnitude, int fraction_bits, int least) {
  const uint32_t bits = bits_of<uint32_t>(magnitude);
  if (static_cast<int>(bits >> 23) - 127 >= least) {
    const int drop = 23 - fraction_bits;
    const uint32_t rounded = bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1);
    return (rounded >> drop) - (static_cast<uint32_t>(127 + least - 1) << fraction_bits);
  }
  // Multiples of the smallest subnormal: adding 2^23 of them rounds to an integer, half to even.
  const float unit = bits_of<float>(static_cast<uint32_t>(127 + least - fraction_bits) << 23);
  const float counted = magnitude / unit + 8388608.f;
  return bits_of<uint32_t>(counted) - bits_of<uint32_t>(8388608.f);
}

inline float widen(uint32_t magnitude, int fraction_bits, int least) {
  const uint32_t exponent = magnitude >> fraction_bits;
  const float unit = bits_of<float>(static_cast<uint32_t>(127 + least - fraction_bits) << 23);
  if (exponent == 0) return static_cast<float>(magnitude) * unit;
  return bits_of<float>((magnitude << (23 - fraction_bits)) + (static_cast<uint32_t>(127 + least - 1) << 23));
}

inline float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  if (magnitude >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return bits_of<float>(sign | bits_of<uint32_t>(widen(magnitude, 10, -14)));
}

inline uint16_t to_f16(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  const uint32_t found = magnitude >= 0x47800000 ? 0x7c00 : narrow_magnitude(bits_of<float>(magnitude), 10, -14);
  return static_cast<uint16_t>(sign | (found > 0x7c00 ? 0x7c00 : found));
}

inline float from_bf16(uint16_t x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// From a double, rounded once.
inline uint16_t to_f16(double x) {
  float near = static_cast<float>(x);
  // Round to odd first, so that the second rounding sees on which side of a tie x lies.
  uint32_t bits = bits_of<uint32_t>(near);
  if (static_cast<double>(near) != x && (bits & 1) == 0 && near - near == 0) {
    const bool away = (x > near) == (x > 0);
    near = bits_of<float>(away ? bits + 1 : bits - 1);
  }
  return to_f16(near);
}
inline uint16_t to_bf16(double x) {
  float near = static_cast<float>(x);
  uint32_t bits = bits_of<uint32_t>(near);
  if (static_cast<double>(near) != x && (bits & 1) == 0 && near - near == 0) {
    const bool away = (x > near) == (x > 0);
    near = bits_of<float>(away ? bits + 1 : bits - 1);
  }
  return to_bf16(near);
}

inline float from_e4m3(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80) << 24, magnitude = x & 0x7f;
  if (magnitude == 0x7f) return bits_of<float>(0x7fffffffu);
  return bits_of<float>(sign | bits_of<uint32_t>(widen(magnitude, 3, -6)));
}

inline float from_e5m2(uint8_t x) { return from_f16(static_cast<uint16_t>(x << 8)); }

// Clamped to the largest finite value; NaN stays.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;
  const uint32_t found = magnitude >= 0x43e80000 ? 0x7e : narrow_magnitude(bits_of<float>(magnitude), 3, -6);
  return static_cast<uint8_t>(sign | (found > 0x7e ? 0x7e : found));
}

inline uint8_t to_e5m2(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;
  const uint32_t found = magnitude >= 0x47800000 ? 0x7b : narrow_magnitude(bits_of<float>(magnitude), 2, -14);
  return static_cast<uint8_t>(sign | (found > 0x7b ? 0x7b : found));
}

}  // namespace emulator

#endif  // SAGERT_EMULATOR_NARROW_H_
