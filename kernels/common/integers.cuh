// SPDX-License-Identifier: Apache-2.0
// Fixed-width integers: NVRTC brings no <stdint.h>.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
