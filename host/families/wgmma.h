// SPDX-License-Identifier: Apache-2.0
#ifndef SAGERT_HOST_FAMILIES_WGMMA_H_
#define SAGERT_HOST_FAMILIES_WGMMA_H_

#include "../family.h"

namespace sagert {

// The kernels of kernels/sm90: one that quantizes K and V, and attention, which quantizes Q itself.
const Family& wgmma_family();

}  // namespace sagert

#endif  // SAGERT_HOST_FAMILIES_WGMMA_H_
