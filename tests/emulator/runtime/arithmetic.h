// SPDX-License-Identifier: Apache-2.0
// What single instructions compute, for translated kernels.
#ifndef SAGERT_EMULATOR_ARITHMETIC_H_
#define SAGERT_EMULATOR_ARITHMETIC_H_

#include <cmath>
#include <cstdint>

#include "machine.h"
#include "narrow.h"

namespace emulator {

constexpr uint32_t kNan = 0x7fffffff;

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float saturated(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }

// ---- Extrema: of two zeros the positive one is larger; a NaN loses, or wins as the canonical one ----

inline float max_float(float a, float b) {
  if (a != a) return b != b ? bits_of<float>(kNan) : b;
  if (b != b) return a;
  if (a == b) return bits_of<float>(bits_of<uint32_t>(a) & bits_of<uint32_t>(b));
  return a > b ? a : b;
}
inline float min_float(float a, float b) {
  if (a != a) return b != b ? bits_of<float>(kNan) : b;
  if (b != b) return a;
  if (a == b) return bits_of<float>(bits_of<uint32_t>(a) | bits_of<uint32_t>(b));
  return a < b ? a : b;
}
inline float max_nan(float a, float b) { return a != a || b != b ? bits_of<float>(kNan) : max_float(a, b); }
inline float min_nan(float a, float b) { return a != a || b != b ? bits_of<float>(kNan) : min_float(a, b); }

// ---- Pairs of 16-bit floats ----

inline uint16_t low(uint32_t x) { return static_cast<uint16_t>(x); }
inline uint16_t high(uint32_t x) { return static_cast<uint16_t>(x >> 16); }
inline uint32_t pair(uint32_t low, uint32_t high) { return (low & 0xffff) | high << 16; }

template <typename Half, typename... Words>
inline uint32_t each(Half half, Words... x) {
  return pair(half(low(x)...), half(high(x)...));
}

// Products of two 16-bit floats are exact in double; the sum may not be, but errs far below a half's last bit.
inline uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) {
  return to_f16(static_cast<double>(from_f16(a)) * from_f16(b) + from_f16(c));
}
inline uint16_t add_f16(uint16_t a, uint16_t b) { return to_f16(static_cast<double>(from_f16(a)) + from_f16(b)); }
inline uint16_t sub_f16(uint16_t a, uint16_t b) { return to_f16(static_cast<double>(from_f16(a)) - from_f16(b)); }
inline uint16_t mul_f16(uint16_t a, uint16_t b) { return to_f16(static_cast<double>(from_f16(a)) * from_f16(b)); }
inline uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  return to_bf16(static_cast<double>(from_bf16(a)) * from_bf16(b) + from_bf16(c));
}
inline uint16_t add_bf16(uint16_t a, uint16_t b) { return to_bf16(static_cast<double>(from_bf16(a)) + from_bf16(b)); }
inline uint16_t sub_bf16(uint16_t a, uint16_t b) { return to_bf16(static_cast<double>(from_bf16(a)) - from_bf16(b)); }
inline uint16_t mul_bf16(uint16_t a, uint16_t b) { return to_bf16(static_cast<double>(from_bf16(a)) * from_bf16(b)); }

inline uint16_t max_f16(uint16_t a, uint16_t b) { return to_f16(max_float(from_f16(a), from_f16(b))); }
inline uint16_t min_f16(uint16_t a, uint16_t b) { return to_f16(min_float(from_f16(a), from_f16(b))); }
inline uint16_t max_nan_f16(uint16_t a, uint16_t b) { return to_f16(max_nan(from_f16(a), from_f16(b))); }
inline uint16_t min_nan_f16(uint16_t a, uint16_t b) { return to_f16(min_nan(from_f16(a), from_f16(b))); }
inline uint16_t max_bf16(uint16_t a, uint16_t b) { return to_bf16(max_float(from_bf16(a), from_bf16(b))); }
inline uint16_t min_bf16(uint16_t a, uint16_t b) { return to_bf16(min_float(from_bf16(a), from_bf16(b))); }
inline uint16_t max_nan_bf16(uint16_t a, uint16_t b) { return to_bf16(max_nan(from_bf16(a), from_bf16(b))); }
inline uint16_t min_nan_bf16(uint16_t a, uint16_t b) { return to_bf16(min_nan(from_bf16(a), from_bf16(b))); }
inline uint16_t ex2_f16(uint16_t x) { return to_f16(std::exp2(from_f16(x))); }
inline uint16_t ex2_bf16(uint16_t x) { return to_bf16(flushed(std::exp2(flushed(from_bf16(x))))); }

// ---- Bits ----

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i;
    uint32_t byte = bytes >> 8 * (choice & 7) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

template <typename T>
inline T shift_left(T x, uint32_t by) {
  return by >= 8 * sizeof(T) ? 0 : static_cast<T>(x << by);
}
template <typename T>
inline T shift_right(T x, uint32_t by) {
  if (by >= 8 * sizeof(T)) return x < 0 ? static_cast<T>(-1) : 0;
  return static_cast<T>(x >> by);
}

inline uint32_t funnel_left(uint32_t a, uint32_t b, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(b) << 32 | a) << by >> 32);
}
inline uint32_t funnel_right(uint32_t a, uint32_t b, uint32_t by) {
  return static_cast<uint32_t>(by >= 32 ? b : (static_cast<uint64_t>(b) << 32 | a) >> by);
}

template <typename U>
inline U insert_bits(U a, U b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  if (position >= 8 * sizeof(U)) return b;
  const U ones = length >= 8 * sizeof(U) ? ~U{0} : (U{1} << length) - 1;
  return (b & ~(ones << position)) | (a & ones) << position;
}

template <typename T>
inline T extract_bits(T a, uint32_t position, uint32_t length) {
  constexpr bool is_signed = static_cast<T>(-1) < 0;
  constexpr uint32_t width = 8 * sizeof(T);
  position &= 0xff, length &= 0xff;
  auto bit = [&](uint32_t i) { return static_cast<uint64_t>(a) >> i & 1; };
  const uint64_t sign =
      is_signed && length != 0 ? bit(position + length > width ? width - 1 : position + length - 1) : 0;
  uint64_t result = 0;
  for (uint32_t i = 0; i < width; ++i) {
    result |= (i < length && position + i < width ? bit(position + i) : sign) << i;
  }
  return static_cast<T>(result);
}

template <typename A, typename B>
inline int32_t dot4(uint32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 4; ++i) c += static_cast<A>(a >> 8 * i) * static_cast<B>(b >> 8 * i);
  return c;
}

template <typename Wide, typename T>
inline T multiply_high(T a, T b) {
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
}

// Division by zero gives all ones on the device.
template <typename T>
inline T divided(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (b == static_cast<T>(-1) && static_cast<T>(-1) < 0) return static_cast<T>(0 - a);
  return a / b;
}
template <typename T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if (b == static_cast<T>(-1) && static_cast<T>(-1) < 0) return 0;
  return a % b;
}

// ---- Float to integer: clamped, NaN to 0 ----

template <typename T>
inline T to_integer(double x) {
  constexpr bool is_signed = static_cast<T>(-1) < 0;
  constexpr int bits = 8 * sizeof(T) - is_signed;
  const double limit = std::ldexp(1.0, bits);
  if (x != x) return 0;
  if (x >= limit) return static_cast<T>(is_signed ? ~(T{1} << (8 * sizeof(T) - 1)) : ~T{0});
  if (x <= (is_signed ? -limit : 0.0)) return is_signed ? static_cast<T>(T{1} << (8 * sizeof(T) - 1)) : T{0};
  return static_cast<T>(x);
}

// Clamped to a narrower integer type.
template <typename To>
inline To clamped(int64_t x) {
  constexpr bool is_signed = static_cast<To>(-1) < 0;
  constexpr int bits = 8 * sizeof(To) - is_signed;
  const int64_t most = (int64_t{1} << bits) - 1, least = is_signed ? -most - 1 : 0;
  return static_cast<To>(x > most ? most : x < least ? least : x);
}

// a and b clamped, in the low bytes, b lowest; c moves up.
template <typename To>
inline uint32_t packed(int32_t a, int32_t b, uint32_t c) {
  constexpr int bits = 8 * sizeof(To);
  constexpr uint32_t ones = (1u << bits) - 1;
  const uint32_t both =
      (static_cast<uint32_t>(clamped<To>(a)) & ones) << bits | (static_cast<uint32_t>(clamped<To>(b)) & ones);
  return bits == 16 ? both : c << 2 * bits | both;
}

}  // namespace emulator

#endif  // SAGERT_EMULATOR_ARITHMETIC_H_
