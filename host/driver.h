// SPDX-License-Identifier: Apache-2.0
// The part of the NVIDIA driver API that libsagert uses, declared here and found in the driver at the first call that
// needs it. Loading libsagert loads no driver.
#ifndef SAGERT_HOST_DRIVER_H_
#define SAGERT_HOST_DRIVER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "sagert.h"

namespace sagert {

// Names and values of the driver's own API.
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUdeviceptr = uintptr_t;

enum : CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_NO_DEVICE = 100
};

enum : int {
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
  CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4,
  CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
  CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1,
  CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_128B = 3,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2,
  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0
};

struct CUlaunchAttribute {
  int id;
  alignas(8) union {
    char pad[64];
    struct {
      unsigned int x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72, "the driver's layout");

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

struct CUlaunchConfig {
  unsigned int gridDimX, gridDimY, gridDimZ;
  unsigned int blockDimX, blockDimY, blockDimZ;
  unsigned int sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned int numAttrs;
};

#if defined(_WIN32)
#define SAGERT_CUDAAPI __stdcall
#else
#define SAGERT_CUDAAPI
#endif

// X(member, exported name, parameters)
#define SAGERT_DRIVER_SYMBOLS(X)                                                                                       \
  X(cuInit, "cuInit", (unsigned int))                                                                                  \
  X(cuGetErrorName, "cuGetErrorName", (CUresult, const char**))                                                        \
  X(cuGetErrorString, "cuGetErrorString", (CUresult, const char**))                                                    \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int*))                                                                      \
  X(cuDeviceGet, "cuDeviceGet", (CUdevice*, int))                                                                      \
  X(cuDeviceGetName, "cuDeviceGetName", (char*, int, CUdevice))                                                        \
  X(cuDeviceGetUuid, "cuDeviceGetUuid", (void*, CUdevice))                                                             \
  X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t*, CUdevice))                                                      \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, CUdevice))                                               \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))                                      \
  X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                                             \
  X(cuCtxGetCurrent, "cuCtxGetCurrent", (CUcontext*))                                                                  \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext))                                                              \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext*))                                                               \
  X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int*))                                    \
  X(cuLibraryLoadData, "cuLibraryLoadData",                                                                            \
    (CUlibrary*, const void*, void*, void**, unsigned int, void*, void**, unsigned int))                               \
  X(cuLibraryUnload, "cuLibraryUnload", (CUlibrary))                                                                   \
  X(cuLibraryGetKernel, "cuLibraryGetKernel", (CUkernel*, CUlibrary, const char*))                                     \
  X(cuKernelGetFunction, "cuKernelGetFunction", (CUfunction*, CUkernel))                                               \
  X(cuKernelSetAttribute, "cuKernelSetAttribute", (int, int, CUkernel, CUdevice))                                      \
  X(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                                                  \
    (CUtensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, int, \
     int, int))                                                                                                        \
  X(cuMemsetD32Async, "cuMemsetD32Async", (CUdeviceptr, unsigned int, size_t, CUstream))                               \
  X(cuLaunchKernelEx, "cuLaunchKernelEx", (const CUlaunchConfig*, CUfunction, void**, void**))

struct DriverApi {
#define SAGERT_DECLARE(member, name, parameters) CUresult(SAGERT_CUDAAPI* member) parameters = nullptr;
  SAGERT_DRIVER_SYMBOLS(SAGERT_DECLARE)
#undef SAGERT_DECLARE
};

struct Device {
  CUdevice handle = 0;
  sagert_device info{};
  int64_t l2_bytes = 0;
  std::atomic<CUcontext> context{nullptr};  // the primary context once retained
};

// The lowest CUDA version of a driver that has everything above.
constexpr int32_t kDriverMin = 12000;

class Driver {
 public:
  // The initialized driver. Throws Error (NO_DRIVER); a failure is tried again at the next call.
  static Driver& get();
  // CUDA version of the driver, also when it is too old for get().
  static int32_t query_version();

  const DriverApi& api() const { return api_; }
  int32_t version() const { return version_; }
  int device_count() const { return device_count_; }
  // Throws Error (INVALID_ARGUMENT) for an ordinal that does not exist.
  Device& device(int32_t ordinal) const;
  // The device's primary context, retained once.
  CUcontext context(Device& device) const;
  void release_contexts() const;

  // Throws Error when result is not success; `doing` completes "the driver reported ... while".
  void check(CUresult result, const char* doing) const {
    if (result != CUDA_SUCCESS) raise(result, doing);
  }
  [[noreturn]] void raise(CUresult result, const std::string& doing) const;

 private:
  Driver() = default;
  static std::unique_ptr<Driver> open();
  void initialize();
  void read_device(int ordinal);

  DriverApi api_;
  int32_t version_ = 0;
  int device_count_ = 0;
  int64_t process_ = 0;
  std::unique_ptr<Device[]> devices_;
};

// Makes a device's primary context current, and restores what was current before.
class ContextGuard {
 public:
  ContextGuard(const Driver& driver, CUcontext context);
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// Lets this thread do what stream capture forbids (loading code), so that a first call may be a captured one.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// "12.8" for 12080.
std::string cuda_version_text(int32_t version);
// "R525" for 12000: the first driver branch with that CUDA version.
std::string driver_branch_text(int32_t version);

}  // namespace sagert

#endif  // SAGERT_HOST_DRIVER_H_
