// SPDX-License-Identifier: Apache-2.0
#ifndef SAGERT_HOST_FAMILIES_PORTABLE_H_
#define SAGERT_HOST_FAMILIES_PORTABLE_H_

#include "../family.h"

namespace sagert {

// The kernels of kernels/portable: statistics of K and V, quantization of K and V, of Q, attention.
const Family& portable_family();

}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_PORTABLE_H_
