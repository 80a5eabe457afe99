// SPDX-License-Identifier: Apache-2.0
// Each thread's recent selections: a program asks for the same few requests again and again.
#ifndef SAGERT_HOST_RECENT_H_
#define SAGERT_HOST_RECENT_H_

#include <cstdint>

#include "registry.h"
#include "sagert.h"

namespace sagert {

// What this thread found for the request on the device before; null when it is not kept. Selection is a pure function
// and a device never changes, so that nothing ever has to be forgotten. Only what was checked and served is kept.
const Selection* recall(const sagert_request& request, int32_t device) noexcept;

void keep(const sagert_request& request, int32_t device, const Selection& selection) noexcept;

}  // namespace sagert

#endif  // SAGERT_HOST_RECENT_H_
