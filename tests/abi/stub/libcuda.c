/* SPDX-License-Identifier: Apache-2.0 */
/* A driver without a GPU, steered by environment variables:
 *   STUB_DRIVER       CUDA version (12090)
 *   STUB_CAPABILITY   one capability per device, separated by commas ("90")
 *   STUB_MULTIPROCESSORS  of every device (132)
 *   STUB_INIT, STUB_RETAIN, STUB_LOAD, STUB_GET_KERNEL, STUB_FUNCTION, STUB_ATTRIBUTE, STUB_TENSOR_MAP,
 *                     STUB_MEMSET, STUB_LAUNCH   errors to return
 *   STUB_FAIL_ONCE    if set, STUB_LOAD applies to the first load only
 *   STUB_LOG          file that receives one line per call
 *   STUB_TYPES        file of lines "symbol types", types being one letter per parameter: p, l (64 bits), i, f,
 *                     t (tensor map, shown as the number of its encoding)
 * Memory is the host's, so that programs can fill it and read it back; launches and memsets leave it alone.
 * It insists on what the real one insists on: cuInit first, a current context, relaxed capture mode to load code, no
 * use after fork, aligned tensor maps, whole clusters, leave for large ones. A symbol is dropped by compiling with
 * -DcuName=absent. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MAX_KERNELS 4096

typedef struct {
  unsigned id, pad;
  union {
    unsigned cluster[3];
    int serialization;
    char bytes[64];
  } value;
} launch_attribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  launch_attribute* attrs;
  unsigned attr_count;
} launch_config;

typedef struct {
  char name[256];
  int large_clusters;
} kernel_record;

static int g_pid;
static int g_libraries;
static int g_loads;
static kernel_record g_kernels[MAX_KERNELS];
static int g_kernel_count;
static int g_maps;
static __thread int t_mode; /* 0: global, 2: relaxed */
static __thread void* t_stack[16];
static __thread int t_depth;

static int env_int(const char* name, int fallback) {
  const char* text = getenv(name);
  return text != NULL && *text != 0 ? atoi(text) : fallback;
}

static void note(const char* format, ...) {
  const char* path = getenv("STUB_LOG");
  if (path == NULL) return;
  char line[4096];
  va_list args;
  va_start(args, format);
  int size = vsnprintf(line, sizeof(line) - 2, format, args);
  va_end(args);
  if (size > (int)sizeof(line) - 2) size = (int)sizeof(line) - 2;
  line[size++] = '\n';
  int fd = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (fd >= 0) {
    if (write(fd, line, (size_t)size) < 0) abort();
    close(fd);
  }
}

static int capabilities(int* out, int limit) {
  const char* text = getenv("STUB_CAPABILITY");
  if (text == NULL) text = "90";
  int count = 0;
  while (*text != 0 && count < limit) {
    out[count++] = (int)strtol(text, (char**)&text, 10);
    if (*text == ',') ++text;
  }
  return count;
}

static int usable(void) { return g_pid == getpid() ? 0 : 3; }
#define REQUIRE_INIT()            \
  do {                            \
    int state = usable();         \
    if (state != 0) return state; \
  } while (0)

API int cuInit(unsigned flags) {
  int error = env_int("STUB_INIT", 0);
  note("cuInit %u", flags);
  if (error == 0) g_pid = getpid();
  return error;
}

API int cuDriverGetVersion(int* version) {
  *version = env_int("STUB_DRIVER", 12090);
  return 0;
}

API int cuGetErrorName(int error, const char** name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_STUB";
  return 0;
}

API int cuGetErrorString(int error, const char** text) {
  *text = error == 2 ? "out of memory" : "stub error";
  return 0;
}

API int cuDeviceGetCount(int* count) {
  REQUIRE_INIT();
  int list[16];
  *count = capabilities(list, 16);
  return 0;
}

API int cuDeviceGet(int* device, int ordinal) {
  REQUIRE_INIT();
  *device = ordinal;
  return 0;
}

API int cuDeviceGetName(char* name, int size, int device) {
  snprintf(name, (size_t)size, "Stub GPU %d", device);
  return 0;
}

API int cuDeviceGetUuid(void* uuid, int device) {
  memset(uuid, 0xa0 + device, 16);
  return 0;
}

API int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  *bytes = ((size_t)80 << 30) + (size_t)device;
  return 0;
}

API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int list[16];
  int count = capabilities(list, 16);
  if (device < 0 || device >= count) return 101;
  switch (attribute) {
    case 16:
      *value = env_int("STUB_MULTIPROCESSORS", 132);
      return 0;
    case 38:
      *value = env_int("STUB_L2", 60 << 20);
      return 0;
    case 75:
      *value = list[device] / 10;
      return 0;
    case 76:
      *value = list[device] % 10;
      return 0;
    case 97:
      *value = 232448;
      return 0;
    default:
      return 1;
  }
}

API int cuDevicePrimaryCtxRetain(void** context, int device) {
  REQUIRE_INIT();
  note("cuDevicePrimaryCtxRetain %d", device);
  *context = (void*)(uintptr_t)(0x1000 + device);
  return env_int("STUB_RETAIN", 0);
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
  note("cuDevicePrimaryCtxRelease %d", device);
  return 0;
}

API int cuCtxGetCurrent(void** context) {
  REQUIRE_INIT();
  *context = t_depth > 0 ? t_stack[t_depth - 1] : NULL;
  return 0;
}

API int cuCtxPushCurrent_v2(void* context) {
  REQUIRE_INIT();
  t_stack[t_depth++] = context;
  return 0;
}

API int cuCtxPopCurrent_v2(void** context) {
  if (t_depth == 0) return 201;
  *context = t_stack[--t_depth];
  return 0;
}

API int cuThreadExchangeStreamCaptureMode(int* mode) {
  REQUIRE_INIT();
  int old = t_mode;
  t_mode = *mode;
  *mode = old;
  return 0;
}

API int cuLibraryLoadData(void** library, const void* image, void* a, void** b, unsigned c, void* d, void** e,
                          unsigned f) {
  REQUIRE_INIT();
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  int error = env_int("STUB_LOAD", 0);
  int first = __atomic_fetch_add(&g_loads, 1, __ATOMIC_SEQ_CST) == 0;
  if (getenv("STUB_FAIL_ONCE") != NULL && !first) error = 0;
  note("cuLibraryLoadData %.16s error %d", (const char*)image, error);
  if (t_mode != 2) return 900;
  if (error != 0) return error;
  *library = (void*)(uintptr_t)(0x2000 + __atomic_fetch_add(&g_libraries, 1, __ATOMIC_SEQ_CST));
  return 0;
}

API int cuLibraryUnload(void* library) {
  note("cuLibraryUnload %p", library);
  return 0;
}

API int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  REQUIRE_INIT();
  int error = env_int("STUB_GET_KERNEL", 0);
  note("cuLibraryGetKernel %p %s", library, name);
  if (error != 0) return error;
  kernel_record* record = &g_kernels[__atomic_fetch_add(&g_kernel_count, 1, __ATOMIC_SEQ_CST) % MAX_KERNELS];
  snprintf(record->name, sizeof(record->name), "%s", name);
  *kernel = record;
  return 0;
}

API int cuKernelGetFunction(void** function, void* kernel) {
  REQUIRE_INIT();
  if (t_depth == 0) return 201;
  if (t_mode != 2) return 900;
  note("cuKernelGetFunction %s context %p", ((kernel_record*)kernel)->name, t_stack[t_depth - 1]);
  *function = kernel;
  return env_int("STUB_FUNCTION", 0);
}

API int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  REQUIRE_INIT();
  note("cuKernelSetAttribute %s %d %d device %d", ((kernel_record*)kernel)->name, attribute, value, device);
  if (attribute == 14) ((kernel_record*)kernel)->large_clusters = value;
  return env_int("STUB_ATTRIBUTE", 0);
}

API int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  REQUIRE_INIT();
  if (t_depth == 0) return 201;
  *address = (uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *address != 0 ? 0 : 2;
}

API int cuMemFree_v2(uint64_t address) {
  free((void*)(uintptr_t)address);
  return 0;
}

API int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  memcpy((void*)(uintptr_t)to, from, bytes);
  return 0;
}

API int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  memcpy(to, (const void*)(uintptr_t)from, bytes);
  return 0;
}

API int cuStreamCreate(void** stream, unsigned flags) {
  (void)flags;
  *stream = (void*)(uintptr_t)0x5000;
  return 0;
}

API int cuStreamSynchronize(void* stream) { return stream == (void*)(uintptr_t)0x5000 ? 0 : 400; }

API int cuStreamDestroy_v2(void* stream) { return stream == (void*)(uintptr_t)0x5000 ? 0 : 400; }

static void format_parameters(const char* symbol, void** parameters, char* out, size_t size) {
  const char* path = getenv("STUB_TYPES");
  FILE* file = path != NULL ? fopen(path, "r") : NULL;
  char name[256], types[128];
  out[0] = 0;
  while (file != NULL && fscanf(file, "%255s %127s", name, types) == 2) {
    if (strcmp(name, symbol) != 0) continue;
    size_t used = 0;
    for (int i = 0; types[i] != 0 && used < size; ++i) {
      const void* value = parameters[i];
      if (types[i] == 'i') used += (size_t)snprintf(out + used, size - used, " %d", *(const int32_t*)value);
      if (types[i] == 'f') used += (size_t)snprintf(out + used, size - used, " %.9g", (double)*(const float*)value);
      if (types[i] == 't') used += (size_t)snprintf(out + used, size - used, " %d", *(const int32_t*)value);
      if (types[i] == 'p' || types[i] == 'l') {
        used += (size_t)snprintf(out + used, size - used, " %lld", (long long)*(const int64_t*)value);
      }
    }
    break;
  }
  if (file != NULL) fclose(file);
}

API int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                               const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                               int swizzle, int promotion, int fill) {
  REQUIRE_INIT();
  if ((uintptr_t)map % 64 != 0 || (uintptr_t)address % 16 != 0 || rank != 4) return 1;
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > (uint64_t)1 << 32 || box[i] == 0 || box[i] > 256) return 1;
    if (i + 1 < rank && (strides[i] % 16 != 0 || strides[i] >= (uint64_t)1 << 40)) return 1;
  }
  int number = __atomic_add_fetch(&g_maps, 1, __ATOMIC_SEQ_CST);
  memset(map, 0, 128);
  memcpy(map, &number, sizeof(number));
  note(
      "cuTensorMapEncodeTiled %d type %d address %llu sizes %llu %llu %llu %llu strides %llu %llu %llu box %u %u %u %u "
      "steps %u %u %u %u modes %d %d %d %d",
      number, type, (unsigned long long)(uintptr_t)address, (unsigned long long)sizes[0], (unsigned long long)sizes[1],
      (unsigned long long)sizes[2], (unsigned long long)sizes[3], (unsigned long long)strides[0],
      (unsigned long long)strides[1], (unsigned long long)strides[2], box[0], box[1], box[2], box[3], steps[0],
      steps[1], steps[2], steps[3], interleave, swizzle, promotion, fill);
  return env_int("STUB_TENSOR_MAP", 0);
}

API int cuMemsetD32Async(uintptr_t address, unsigned value, size_t count, void* stream) {
  REQUIRE_INIT();
  if (t_depth == 0) return 201;
  if (address % 4 != 0) return 1;
  note("cuMemsetD32Async %llu value %u count %llu stream %p", (unsigned long long)address, value,
       (unsigned long long)count, stream);
  return env_int("STUB_MEMSET", 0);
}

API int cuLaunchKernelEx(const launch_config* config, void* function, void** parameters, void** extra) {
  REQUIRE_INIT();
  if (t_depth == 0) return 201;
  if (extra != NULL) return 1;
  unsigned cluster = 1;
  int dependent = 0;
  for (unsigned i = 0; i < config->attr_count; ++i) {
    const launch_attribute* attribute = &config->attrs[i];
    if (attribute->id == 4) {
      cluster = attribute->value.cluster[0];
      if (attribute->value.cluster[1] != 1 || attribute->value.cluster[2] != 1) return 1;
    } else if (attribute->id == 6) {
      dependent = attribute->value.serialization;
    } else {
      return 1;
    }
  }
  if (cluster == 0 || config->grid[0] % cluster != 0) return 1;
  if (cluster > 8 && !((kernel_record*)function)->large_clusters) return 912;
  if (getenv("STUB_LOG") != NULL) {
    char text[3000];
    const char* name = ((kernel_record*)function)->name;
    format_parameters(name, parameters, text, sizeof(text));
    note(
        "cuLaunchKernelEx %s grid %u block %u shared %u stream %p context %p cluster %u dependent %d height %u "
        "params%s",
        name, config->grid[0], config->block[0], config->shared, config->stream, t_stack[t_depth - 1], cluster,
        dependent, config->grid[1], text);
  }
  return env_int("STUB_LAUNCH", 0);
}
