// SPDX-License-Identifier: Apache-2.0
// Arithmetic in fp32 rounded down, up or to zero.
#include <cfenv>
#include <cmath>

#include "block.h"

namespace emulator {

float rounded(char operation, char mode, float a, float b, float c) {
  const int previous = fegetround();
  fesetround(mode == 'm' ? FE_DOWNWARD : mode == 'p' ? FE_UPWARD : mode == 'z' ? FE_TOWARDZERO : FE_TONEAREST);
  // volatile: nothing may move over the changes of mode.
  volatile float x = a, y = b, z = c, result = 0.f;
  if (operation == '+') result = x + y;
  if (operation == '-') result = x - y;
  if (operation == '*') result = x * y;
  if (operation == '/') result = x / y;
  if (operation == 'f') result = std::fma(x, y, z);
  if (operation == 'q') result = std::sqrt(x);
  fesetround(previous);
  return result;
}

}  // namespace emulator
