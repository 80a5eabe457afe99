// SPDX-License-Identifier: Apache-2.0
// What differs between operating systems: the NVIDIA driver's library, this library's own folder, the process id.
#ifndef SAGERT_HOST_PLATFORM_H_
#define SAGERT_HOST_PLATFORM_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sagert::platform {

const char* driver_library_name();

// Handle of the driver's library, or null with *reason filled.
void* open_driver_library(std::string* reason);
void* find_symbol(void* library, const char* name);

// Absolute folder of libsagert, without a trailing separator. Throws Error (INTERNAL).
std::string library_folder();

// Whole content of a file of at most max_bytes; false with *reason filled when it cannot be read.
bool read_file(const std::string& path, uint64_t max_bytes, std::vector<uint8_t>* content, std::string* reason);

int64_t process_id();

}  // namespace sagert::platform

#endif  // SAGERT_HOST_PLATFORM_H_
