// SPDX-License-Identifier: Apache-2.0
#include "bundle.h"

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "error.h"
#include "platform.h"
#include "sha256.h"
#include "table.h"

namespace sagert {
namespace {

constexpr int32_t kDefaultSharedLimit = 48 * 1024;  // more shared memory must be asked for
constexpr int32_t kPortableClusterMax = 8;          // so must larger clusters

// One per kernel of the table. `library` and `kernel` are guarded by the cache's mutex.
struct LoadedKernel {
  CUlibrary library = nullptr;
  CUkernel kernel = nullptr;
};

struct KernelCache {
  explicit KernelCache(int device_count)
      : loaded(new LoadedKernel[static_cast<size_t>(kKernelCount)]),
        ready(new std::atomic<CUkernel>[static_cast<size_t>(kKernelCount) * static_cast<size_t>(device_count)]()) {}

  std::mutex mutex;
  std::unique_ptr<LoadedKernel[]> loaded;
  std::unique_ptr<std::atomic<CUkernel>[]> ready;  // [kernel][device], set last
};

KernelCache& cache(const Driver& driver) {
  // Never destroyed: threads may still launch while the process ends.
  static KernelCache* instance = new KernelCache(driver.device_count());
  return *instance;
}

std::string join(const std::string& folder, const char* file) { return folder + "/" + file; }

const char* kReinstall = "; reinstall sagert";

// The driver takes no length and crashes on a file cut short, so nothing unchecked ever reaches it.
std::vector<uint8_t> read_cubin(const KernelEntry& entry) {
  std::string path = join(bundle_folder(entry.bundle), entry.file);
  std::vector<uint8_t> image;
  std::string reason;
  if (!platform::read_file(path, entry.length, &image, &reason)) {
    fail(SAGERT_ERROR_INTEGRITY, "kernel file ", path, " cannot be read: ", reason, kReinstall);
  }
  if (image.size() != entry.length) {
    fail(SAGERT_ERROR_INTEGRITY, "kernel file ", path, " has ", image.size(), " bytes instead of ", entry.length,
         kReinstall);
  }
  Digest digest = sha256(image.data(), image.size());
  if (std::memcmp(digest.data(), entry.sha256, digest.size()) != 0) {
    fail(SAGERT_ERROR_INTEGRITY, "kernel file ", path, " has been altered: its sha256 is ",
         to_hex(digest.data(), digest.size()), " instead of ", to_hex(entry.sha256, sizeof(entry.sha256)), kReinstall);
  }
  return image;
}

CUkernel load(const Driver& driver, LoadedKernel& slot, const KernelEntry& entry) {
  if (slot.kernel != nullptr) return slot.kernel;
  std::vector<uint8_t> image = read_cubin(entry);
  CUlibrary library = nullptr;
  CUresult result = driver.api().cuLibraryLoadData(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (result != CUDA_SUCCESS) {
    driver.raise(result, concat("loading kernel ", entry.file, " of bundle ", kBundles[entry.bundle].name));
  }
  CUkernel kernel = nullptr;
  result = driver.api().cuLibraryGetKernel(&kernel, library, entry.symbol);
  if (result != CUDA_SUCCESS) {
    driver.api().cuLibraryUnload(library);
    driver.raise(result, concat("finding ", entry.symbol, " in kernel file ", entry.file));
  }
  slot.library = library;
  slot.kernel = kernel;
  return kernel;
}

void prepare(const Driver& driver, const Device& device, CUkernel kernel, const KernelEntry& entry) {
  int32_t shared = entry.shared + entry.static_shared;
  if (shared > kDefaultSharedLimit) {
    if (shared > device.info.shared_memory) {
      fail(SAGERT_ERROR_INTERNAL, "kernel ", entry.file, " needs ", shared, " bytes of shared memory, device ",
           device.info.ordinal, " has ", device.info.shared_memory);
    }
    CUresult result = driver.api().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, entry.shared,
                                                        kernel, device.handle);
    if (result != CUDA_SUCCESS) driver.raise(result, concat("reserving shared memory for kernel ", entry.file));
  }
  if (entry.cluster > kPortableClusterMax) {
    CUresult result = driver.api().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, kernel,
                                                        device.handle);
    if (result != CUDA_SUCCESS) driver.raise(result, concat("allowing large clusters for kernel ", entry.file));
  }
  CUfunction function = nullptr;  // forces the load on this device, which lazy loading would leave to the launch
  CUresult result = driver.api().cuKernelGetFunction(&function, kernel);
  if (result != CUDA_SUCCESS) {
    driver.raise(result, concat("loading kernel ", entry.file, " on device ", device.info.ordinal));
  }
}

}  // namespace

std::string bundle_folder(int32_t bundle) {
  std::string folder = platform::library_folder();
  size_t end = folder.find_last_of("/\\");
  return folder.substr(0, end == std::string::npos ? 0 : end) + "/bundles/" + kBundles[bundle].name;
}

void verify_bundle(int32_t bundle) {
  std::string index_path = join(bundle_folder(bundle), "index.json");
  std::vector<uint8_t> content;
  std::string reason;
  if (!platform::read_file(index_path, uint64_t{64} << 20, &content, &reason)) {
    fail(SAGERT_ERROR_INTEGRITY, "bundle index ", index_path, " cannot be read: ", reason, kReinstall);
  }
  std::string index(content.begin(), content.end());
  for (int32_t i = 0; i < kKernelCount; ++i) {
    const KernelEntry& entry = kKernels[i];
    if (entry.bundle != bundle) continue;
    read_cubin(entry);
    if (index.find(entry.file) == std::string::npos ||
        index.find(to_hex(entry.sha256, sizeof(entry.sha256))) == std::string::npos) {
      fail(SAGERT_ERROR_INTEGRITY, "bundle index ", index_path, " does not list ", entry.file,
           " with the sha256 that this library was built with", kReinstall);
    }
  }
}

CUkernel ready_kernel(const Driver& driver, const Device& device, int32_t kernel) {
  KernelCache& kernels = cache(driver);
  std::atomic<CUkernel>& ready =
      kernels.ready[static_cast<size_t>(kernel) * static_cast<size_t>(driver.device_count()) +
                    static_cast<size_t>(device.info.ordinal)];
  CUkernel handle = ready.load(std::memory_order_acquire);
  if (handle != nullptr) return handle;
  std::lock_guard<std::mutex> lock(kernels.mutex);
  handle = ready.load(std::memory_order_relaxed);
  if (handle != nullptr) return handle;
  RelaxedCapture relaxed(driver);
  const KernelEntry& entry = kKernels[kernel];
  handle = load(driver, kernels.loaded[static_cast<size_t>(kernel)], entry);
  prepare(driver, device, handle, entry);
  ready.store(handle, std::memory_order_release);
  return handle;
}

void unload_kernels(const Driver& driver) {
  KernelCache& kernels = cache(driver);
  std::lock_guard<std::mutex> lock(kernels.mutex);
  RelaxedCapture relaxed(driver);
  for (int32_t i = 0; i < kKernelCount; ++i) {
    for (int device = 0; device < driver.device_count(); ++device) {
      kernels.ready[static_cast<size_t>(i) * static_cast<size_t>(driver.device_count()) + static_cast<size_t>(device)]
          .store(nullptr);
    }
    LoadedKernel& slot = kernels.loaded[static_cast<size_t>(i)];
    if (slot.library != nullptr) driver.api().cuLibraryUnload(slot.library);
    slot = LoadedKernel();
  }
}

}  // namespace sagert
