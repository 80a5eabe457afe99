// SPDX-License-Identifier: Apache-2.0
#ifndef SAGERT_HOST_FAMILIES_MMA_H_
#define SAGERT_HOST_FAMILIES_MMA_H_

#include "../family.h"

namespace sagert {

// The kernels of kernels/sm80: two that quantize K and V, and attention, which quantizes Q itself.
const Family& mma_family();

}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_MMA_H_
