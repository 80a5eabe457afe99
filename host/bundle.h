// SPDX-License-Identifier: Apache-2.0
// Kernels from the bundles: found beside libsagert, checked against their sha256, loaded at first use, cached.
#ifndef SAGERT_HOST_BUNDLE_H_
#define SAGERT_HOST_BUNDLE_H_

#include <cstdint>
#include <string>

#include "driver.h"

namespace sagert {

// Absolute folder of a bundle.
std::string bundle_folder(int32_t bundle);

// Reads every file of a bundle again. Throws Error (INTEGRITY) naming the first that is wrong.
void verify_bundle(int32_t bundle);

// The kernel, loaded and prepared on the device, whose context must be current. No lock once it is.
// Throws Error; a failure is tried again at the next call.
CUkernel ready_kernel(const Driver& driver, const Device& device, int32_t kernel);

// Unloads all kernels. No call may be in flight.
void unload_kernels(const Driver& driver);

}  // namespace sagert

#endif  // SAGERT_HOST_BUNDLE_H_
