// SPDX-License-Identifier: Apache-2.0
// A driver whose device is the CPU. What it insists on, and its memory, are the stub driver's
// (tests/abi/stub/libcuda.c, compiled with these functions renamed); code is PTX, of which EMULATOR_TRANSLATIONS, a
// folder, has the translations, named by the text's SHA-256. A launch is over when it returns.
//   EMULATOR_SEED     makes the order of warps random (0: it is not)
//   EMULATOR_THREADS  of the host, that run blocks (all CPUs)
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "block.h"
#include "sha256.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" {
int stub_load(void**, const void*, void*, void**, unsigned, void*, void**, unsigned);
int stub_get_kernel(void**, void*, const char*);
int stub_tensor_map(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*,
                    int, int, int, int);
int stub_memset(uintptr_t, unsigned, size_t, void*);
int stub_launch(const void* config, void* function, void** parameters, void** extra);
}

namespace emulator {
namespace {

enum { kOk = 0, kInvalidValue = 1, kInvalidImage = 200, kNotFound = 500, kLaunchFailed = 719 };

// The driver's own layouts.
struct Attribute {
  unsigned id, pad;
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned attribute_count;
};

struct Loaded {
  const Translation* translation;
  const Kernel* kernel;
};

std::mutex g_mutex;
std::map<void*, const Translation*> g_libraries;
std::map<void*, Loaded> g_kernels;
std::string g_error;

uint64_t number_of(const char* name, uint64_t fallback) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != 0 ? std::strtoull(text, nullptr, 10) : fallback;
}

int refuse(int status, const std::string& why) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_error = why;
  std::fprintf(stderr, "emulator: %s\n", why.c_str());
  return status;
}

std::string path_of(const std::string& text) {
  std::string path = std::getenv("EMULATOR_TRANSLATIONS") != nullptr ? std::getenv("EMULATOR_TRANSLATIONS") : ".";
  path += '/';
  const sagert::Digest digest = sagert::sha256(text.data(), text.size());
  return path + sagert::to_hex(digest.data(), digest.size()) + ".so";
}

// Stacks are costly to make: each host thread keeps a cluster's.
Cluster& own_cluster() {
  static thread_local Cluster cluster;
  return cluster;
}

int run(const Launch& launch) {
  const uint64_t count = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2] / launch.cluster;
  uint64_t workers = number_of("EMULATOR_THREADS", std::thread::hardware_concurrency());
  workers = workers < 1 ? 1 : workers > count ? count : workers;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::string message;
  auto work = [&] {
    Cluster& cluster = own_cluster();
    for (uint64_t i; !failed && (i = next++) < count;) {
      if (cluster.run(launch, i * launch.cluster) || failed.exchange(true)) continue;
      message = cluster.message;
    }
  };
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return failed ? refuse(kLaunchFailed, message) : kOk;
}

}  // namespace
}  // namespace emulator

using namespace emulator;

// Why the last load or launch failed.
EXPORTED const char* emulator_error() { return g_error.c_str(); }

EXPORTED int cuLibraryLoadData(void** library, const void* image, void* a, void** b, unsigned c, void* d, void** e,
                               unsigned f) {
  int status = stub_load(library, image, a, b, c, d, e, f);
  if (status != kOk) return status;
  const std::string path = path_of(static_cast<const char*>(image));
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return refuse(kInvalidImage, dlerror());
  void* found = dlsym(handle, "emulator_translation");
  if (found == nullptr) return refuse(kInvalidImage, path + " is no translation");
  std::lock_guard<std::mutex> lock(g_mutex);
  g_libraries[*library] = static_cast<const Translation*>(found);
  return kOk;
}

EXPORTED int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  int status = stub_get_kernel(kernel, library, name);
  if (status != kOk) return status;
  std::lock_guard<std::mutex> lock(g_mutex);
  const Translation* translation = g_libraries[library];
  for (uint32_t i = 0; i < translation->kernel_count; ++i) {
    if (std::string(translation->kernels[i].name) == name) {
      g_kernels[*kernel] = {translation, &translation->kernels[i]};
      return kOk;
    }
  }
  return kNotFound;
}

EXPORTED int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                                    const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                                    int swizzle, int promotion, int fill) {
  int status =
      stub_tensor_map(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill);
  if (status != kOk) return status;
  TensorMap made = {};
  made.address = reinterpret_cast<uint64_t>(address);
  for (int axis = 0; axis < 4; ++axis) {
    made.sizes[axis] = static_cast<uint32_t>(sizes[axis]);
    made.box[axis] = static_cast<uint16_t>(box[axis]);
    if (steps[axis] != 1) return kInvalidValue;
    if (axis < 3) made.strides[axis] = strides[axis];
  }
  // Types 0, 1 and 2 have 1, 2 and 4 bytes; no others are used.
  if (type > 2 || interleave != 0 || fill != 0) return refuse(kInvalidValue, "a tensor map of unknown form");
  made.element_bytes = static_cast<uint16_t>(1 << type);
  made.swizzle = static_cast<uint16_t>(swizzle);
  std::memcpy(map, &made, sizeof(made));
  return kOk;
}

EXPORTED int cuMemsetD32Async(uintptr_t address, unsigned value, size_t count, void* stream) {
  int status = stub_memset(address, value, count, stream);
  if (status == kOk) std::fill_n(reinterpret_cast<uint32_t*>(address), count, value);
  return status;
}

EXPORTED int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  int status = stub_launch(config, function, parameters, extra);
  if (status != kOk) return status;
  Loaded loaded;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    loaded = g_kernels[function];
  }
  Launch launch = {};
  launch.translation = loaded.translation;
  launch.kernel = loaded.kernel;
  for (int axis = 0; axis < 3; ++axis) {
    launch.grid[axis] = config->grid[axis];
    launch.block[axis] = config->block[axis];
  }
  launch.cluster = 1;
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    if (config->attributes[i].id == 4) launch.cluster = config->attributes[i].value[0];
  }
  launch.dynamic_bytes = config->shared;
  launch.parameters = parameters;
  launch.seed = number_of("EMULATOR_SEED", 0);
  return run(launch);
}
