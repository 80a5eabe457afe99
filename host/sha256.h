// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4).
#ifndef SAGERT_HOST_SHA256_H_
#define SAGERT_HOST_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace sagert {

using Digest = std::array<uint8_t, 32>;

Digest sha256(const void* data, size_t size);
std::string to_hex(const uint8_t* bytes, size_t size);

}  // namespace sagert

#endif  // SAGERT_HOST_SHA256_H_
