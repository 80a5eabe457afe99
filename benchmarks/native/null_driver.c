/* SPDX-License-Identifier: Apache-2.0 */
/* A driver that does nothing at once: a device of compute capability NULL_CAPABILITY (90) whose launches cost nothing,
 * so that what is left of a call's time is libsagert's own. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

static __thread void* t_context;

static int capability(void) {
  const char* text = getenv("NULL_CAPABILITY");
  return text != NULL ? atoi(text) : 90;
}

API int cuInit(unsigned flags) { return (int)(flags & 0u); }
API int cuDriverGetVersion(int* version) { return *version = 12090, 0; }
API int cuGetErrorName(int error, const char** name) { return (void)error, *name = "CUDA_ERROR", 0; }
API int cuGetErrorString(int error, const char** text) { return (void)error, *text = "error", 0; }
API int cuDeviceGetCount(int* count) { return *count = 1, 0; }
API int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
API int cuDeviceGetName(char* name, int size, int device) {
  (void)device;
  if (size > 0) name[0] = 0;
  return 0;
}
API int cuDeviceGetUuid(void* uuid, int device) { return (void)device, memset(uuid, 0, 16), 0; }
API int cuDeviceTotalMem_v2(size_t* bytes, int device) { return (void)device, *bytes = (size_t)80 << 30, 0; }
API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 16:
      *value = 132;
      return 0;
    case 75:
      *value = capability() / 10;
      return 0;
    case 76:
      *value = capability() % 10;
      return 0;
    default:
      *value = 232448;
      return 0;
  }
}
API int cuDevicePrimaryCtxRetain(void** context, int device) { return (void)device, *context = (void*)0x1000, 0; }
API int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
API int cuCtxGetCurrent(void** context) { return *context = t_context, 0; }
API int cuCtxPushCurrent_v2(void* context) { return t_context = context, 0; }
API int cuCtxPopCurrent_v2(void** context) { return *context = t_context, t_context = NULL, 0; }
API int cuThreadExchangeStreamCaptureMode(int* mode) { return *mode = 0, 0; }
API int cuLibraryLoadData(void** library, const void* image, void* a, void** b, unsigned c, void* d, void** e,
                          unsigned f) {
  (void)image, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  return *library = (void*)0x2000, 0;
}
API int cuLibraryUnload(void* library) { return (void)library, 0; }
API int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  (void)library, (void)name;
  return *kernel = (void*)0x3000, 0;
}
API int cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, 0; }
API int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  return (void)attribute, (void)value, (void)kernel, (void)device, 0;
}
API int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                               const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                               int swizzle, int promotion, int fill) {
  (void)type, (void)rank, (void)address, (void)sizes, (void)strides, (void)box, (void)steps, (void)interleave;
  (void)swizzle, (void)promotion, (void)fill;
  return memset(map, 0, 128), 0;
}
API int cuMemsetD32Async(uintptr_t address, unsigned value, size_t count, void* stream) {
  return (void)address, (void)value, (void)count, (void)stream, 0;
}
API int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  return (void)config, (void)function, (void)parameters, (void)extra, 0;
}
