// SPDX-License-Identifier: Apache-2.0
// wgmma: the part of one warp, 16 rows. It is carried out where it is issued, which is the earliest that a device may:
// a missing wait for it does not show.
#include <vector>

#include "block.h"
#include "elements.h"

namespace emulator {
namespace {

// An operand in shared memory.
struct Operand {
  const uint8_t* shared;
  uint32_t end, start, leading, stride, swizzle_bits;

  Operand(Thread& t, uint64_t descriptor) : shared(t.shared), end(t.shared_end) {
    start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const uint32_t mode = static_cast<uint32_t>(descriptor >> 62);
    swizzle_bits = mode == 0 ? 0 : 4 - mode;  // 128, 64 and 32 bytes
  }

  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 7 & ((1u << swizzle_bits) - 1)) << 4; }
  // Of byte `byte` along K of row `row`.
  uint32_t along(uint32_t row, uint32_t byte) const {
    if (swizzle_bits == 0) return start + row / 8 * stride + byte / 16 * leading + row % 8 * 16 + byte % 16;
    return swizzled(start + row / 8 * stride + row % 8 * (16u << swizzle_bits) + byte);
  }
  // Of 16-bit column `column` at `k`, where columns are contiguous and swizzled over 128 bytes.
  uint32_t across(uint32_t column, uint32_t k) const {
    return swizzled(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
  uint32_t read(Lane& lane, uint32_t address, uint32_t bytes) const {
    if (address < kSharedBegin || address + bytes > end) fail(lane, lane.site, "reads outside shared memory");
    return bytes == 1 ? shared[address] : load<uint16_t>(shared + address);
  }
};

template <typename T>
void product(const WarpLanes& warp, const Shape& shape, std::vector<T>& sum, const uint32_t* words, int first) {
  const uint32_t bytes = static_cast<uint32_t>(width_of(shape.a)) / 8, per = 4 / bytes;
  Lane& any = *warp.lane[0];
  static thread_local std::vector<T> a, b;
  a.assign(size_t{16} * shape.k, 0);
  b.assign(size_t{shape.k} * shape.n, 0);
  auto descriptor = [&](int i) { return static_cast<uint64_t>(words[i + 1]) << 32 | words[i]; };
  if (shape.a_shared) {
    const Operand operand(any, descriptor(first));
    const uint32_t row = any.warp % 4 * 16;
    for (uint32_t i = 0; i < 16; ++i) {
      for (uint32_t k = 0; k < shape.k; ++k) {
        a[i * shape.k + k] = decode<T>(shape.a, operand.read(any, operand.along(row + i, k * bytes), bytes));
      }
    }
  } else {
    for (uint32_t t = 0; t < 32; ++t) {
      for (uint32_t r = 0; r < 4; ++r) {
        for (uint32_t e = 0; e < per; ++e) {
          a[(t / 4 + r % 2 * 8) * shape.k + r / 2 * 4 * per + t % 4 * per + e] =
              decode<T>(shape.a, warp.lane[t]->words[first + static_cast<int>(r)] >> e * (32 / per));
        }
      }
    }
  }
  const Operand operand(any, descriptor(first + (shape.a_shared ? 2 : 4)));
  for (uint32_t n = 0; n < shape.n; ++n) {
    for (uint32_t k = 0; k < shape.k; ++k) {
      const uint32_t address = shape.b_across ? operand.across(n, k) : operand.along(n, k * bytes);
      b[k * shape.n + n] = decode<T>(shape.b, operand.read(any, address, bytes));
    }
  }
  for (uint32_t i = 0; i < 16; ++i) {
    T* line = &sum[i * shape.n];
    for (uint32_t k = 0; k < shape.k; ++k) {
      const T factor = a[i * shape.k + k];
      const T* other = &b[k * shape.n];
      for (uint32_t n = 0; n < shape.n; ++n) line[n] += factor * other[n];
    }
  }
}

// Accumulators of a lane in its words, by their type: each has one, or, in fp16, half of one.
template <typename Word>
struct Whole {
  static constexpr int kPerWord = 1;
  static Word get(const uint32_t* words, int e) { return bits_of<Word>(words[e]); }
  static void set(uint32_t* words, int e, double value) { words[e] = bits_of<uint32_t>(static_cast<Word>(value)); }
};

struct Half {
  static constexpr int kPerWord = 2;
  static double get(const uint32_t* words, int e) {
    return from_f16(static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
  }
  static void set(uint32_t* words, int e, double value) {
    const uint32_t bits = to_f16(value);
    words[e / 2] = e % 2 == 0 ? bits : words[e / 2] | bits << 16;
  }
};

template <typename T, typename Accumulators>
void carry_out(const WarpLanes& warp, const Shape& shape) {
  const int count = shape.n / 2;  // accumulators of a lane
  const int first = count / Accumulators::kPerWord;
  const uint32_t* words = warp.lane[0]->words;
  const bool counts = words[first + (shape.a_shared ? 4 : 6)] != 0;
  static thread_local std::vector<T> sum;
  sum.assign(size_t{16} * shape.n, 0);
  auto place = [&](int t, int e) -> T& {
    return sum[static_cast<size_t>((t / 4 + e / 2 % 2 * 8) * shape.n + e / 4 * 8 + t % 4 * 2 + e % 2)];
  };
  for (int t = 0; t < 32 && counts; ++t) {
    for (int e = 0; e < count; ++e) place(t, e) = static_cast<T>(Accumulators::get(warp.lane[t]->words, e));
  }
  product(warp, shape, sum, words, first);
  for (int t = 0; t < 32; ++t) {
    for (int e = 0; e < count; ++e) Accumulators::set(warp.lane[t]->words, e, place(t, e));
  }
}

}  // namespace

void group_multiply(const WarpLanes& warp, const Shape& shape) {
  if (shape.c == Element::kS32) {
    carry_out<int32_t, Whole<int32_t>>(warp, shape);
  } else if (shape.c == Element::kF16) {
    carry_out<double, Half>(warp, shape);
  } else {
    carry_out<double, Whole<float>>(warp, shape);
  }
}

}  // namespace emulator
