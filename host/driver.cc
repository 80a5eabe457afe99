// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <mutex>

#include "error.h"
#include "platform.h"

namespace sagert {
namespace {

std::mutex g_mutex;
std::atomic<Driver*> g_driver{nullptr};

void* open_library() {
  std::string reason;
  void* library = platform::open_driver_library(&reason);
  if (library == nullptr) {
    fail(SAGERT_ERROR_NO_DRIVER, "the NVIDIA driver library ", platform::driver_library_name(),
         " cannot be loaded: ", reason, "; install the NVIDIA driver, ", driver_branch_text(kDriverMin), " or later");
  }
  return library;
}

int32_t read_version(void* library) {
  using GetVersion = CUresult(SAGERT_CUDAAPI*)(int*);
  auto get_version = reinterpret_cast<GetVersion>(platform::find_symbol(library, "cuDriverGetVersion"));
  if (get_version == nullptr) {
    fail(SAGERT_ERROR_NO_DRIVER, "the NVIDIA driver library ", platform::driver_library_name(),
         " has no symbol cuDriverGetVersion; reinstall the NVIDIA driver");
  }
  int version = 0;
  CUresult result = get_version(&version);
  if (result != CUDA_SUCCESS) {
    fail(SAGERT_ERROR_NO_DRIVER, "the NVIDIA driver does not tell its version: error ", result);
  }
  return version;
}

}  // namespace

std::string cuda_version_text(int32_t version) { return concat(version / 1000, ".", version % 1000 / 10); }

std::string driver_branch_text(int32_t version) {
  struct Branch {
    int32_t cuda;
    int32_t branch;
  };
  constexpr Branch kBranches[] = {{12000, 525}, {12010, 530}, {12020, 535}, {12030, 545}, {12040, 550},
                                  {12050, 555}, {12060, 560}, {12080, 570}, {12090, 575}, {13000, 580}};
  for (const Branch& entry : kBranches) {
    if (version <= entry.cuda) return concat("R", entry.branch);
  }
  return concat("one with CUDA ", cuda_version_text(version));
}

Driver& Driver::get() {
  Driver* driver = g_driver.load(std::memory_order_acquire);
  if (driver != nullptr) return *driver;
  std::lock_guard<std::mutex> lock(g_mutex);
  driver = g_driver.load(std::memory_order_relaxed);
  if (driver == nullptr) {
    driver = open().release();  // lives as long as the process: the driver cannot be unloaded
    g_driver.store(driver, std::memory_order_release);
  }
  return *driver;
}

int32_t Driver::query_version() {
  Driver* driver = g_driver.load(std::memory_order_acquire);
  return driver != nullptr ? driver->version_ : read_version(open_library());
}

std::unique_ptr<Driver> Driver::open() {
  std::unique_ptr<Driver> driver(new Driver);
  void* library = open_library();
  // The version comes first: an old driver also lacks symbols, but what its user needs to hear is that it is old.
  driver->version_ = read_version(library);
  if (driver->version_ < kDriverMin) {
    fail(SAGERT_ERROR_NO_DRIVER, "the NVIDIA driver supports CUDA ", cuda_version_text(driver->version_),
         ", sagert needs CUDA ", cuda_version_text(kDriverMin), ": update the driver to ",
         driver_branch_text(kDriverMin), " or later");
  }
#define SAGERT_RESOLVE(member, name, parameters)                                                                      \
  driver->api_.member = reinterpret_cast<CUresult(SAGERT_CUDAAPI*) parameters>(platform::find_symbol(library, name)); \
  if (driver->api_.member == nullptr) {                                                                               \
    fail(SAGERT_ERROR_NO_DRIVER, "the NVIDIA driver library ", platform::driver_library_name(),                       \
         " has no symbol " name ", although it reports CUDA ", cuda_version_text(driver->version_),                   \
         "; update or reinstall the NVIDIA driver");                                                                  \
  }
  SAGERT_DRIVER_SYMBOLS(SAGERT_RESOLVE)
#undef SAGERT_RESOLVE
  driver->process_ = platform::process_id();
  driver->initialize();
  return driver;
}

void Driver::initialize() {
  CUresult result = api_.cuInit(0);
  if (result == CUDA_SUCCESS) result = api_.cuDeviceGetCount(&device_count_);
  if (result == CUDA_ERROR_NO_DEVICE || (result == CUDA_SUCCESS && device_count_ <= 0)) {
    fail(SAGERT_ERROR_NO_DRIVER,
         "the NVIDIA driver finds no device; check that a GPU is present and that CUDA_VISIBLE_DEVICES does not hide "
         "it");
  }
  if (result != CUDA_SUCCESS) {
    const char* name = nullptr;
    const char* text = nullptr;
    api_.cuGetErrorName(result, &name);
    api_.cuGetErrorString(result, &text);
    fail(SAGERT_ERROR_NO_DRIVER, "the NVIDIA driver does not start: ", name != nullptr ? name : "unknown error", " (",
         result, "), ", text != nullptr ? text : "no description");
  }
  devices_ = std::make_unique<Device[]>(static_cast<size_t>(device_count_));
  for (int i = 0; i < device_count_; ++i) read_device(i);
}

void Driver::read_device(int ordinal) {
  Device& device = devices_[ordinal];
  check(api_.cuDeviceGet(&device.handle, ordinal), "getting a device");
  sagert_device& info = device.info;
  info.struct_size = sizeof(info);
  info.ordinal = ordinal;
  info.driver_version = version_;
  check(api_.cuDeviceGetName(info.name, static_cast<int>(sizeof(info.name)), device.handle), "reading a device's name");
  info.name[sizeof(info.name) - 1] = 0;
  check(api_.cuDeviceGetUuid(info.uuid, device.handle), "reading a device's UUID");
  size_t memory = 0;
  check(api_.cuDeviceTotalMem(&memory, device.handle), "reading a device's memory size");
  info.memory = static_cast<int64_t>(memory);
  auto attribute = [&](int which) {
    int value = 0;
    check(api_.cuDeviceGetAttribute(&value, which, device.handle), "reading a device's attributes");
    return value;
  };
  info.capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                    attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  info.multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  info.shared_memory = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  device.l2_bytes = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
}

Device& Driver::device(int32_t ordinal) const {
  if (ordinal < 0 || ordinal >= device_count_) {
    fail_argument("device is ", ordinal, ", but ",
                  device_count_ == 1 ? concat("the only device is 0") : concat("devices are 0 to ", device_count_ - 1));
  }
  return devices_[ordinal];
}

CUcontext Driver::context(Device& device) const {
  CUcontext context = device.context.load(std::memory_order_acquire);
  if (context != nullptr) return context;
  std::lock_guard<std::mutex> lock(g_mutex);
  context = device.context.load(std::memory_order_relaxed);
  if (context == nullptr) {
    RelaxedCapture relaxed(*this);
    check(api_.cuDevicePrimaryCtxRetain(&context, device.handle), "retaining the device's primary context");
    device.context.store(context, std::memory_order_release);
  }
  return context;
}

void Driver::release_contexts() const {
  std::lock_guard<std::mutex> lock(g_mutex);
  for (int i = 0; i < device_count_; ++i) {
    if (devices_[i].context.exchange(nullptr) != nullptr) api_.cuDevicePrimaryCtxRelease(devices_[i].handle);
  }
}

void Driver::raise(CUresult result, const std::string& doing) const {
  if (process_ != platform::process_id()) {
    fail(SAGERT_ERROR_CUDA, "CUDA cannot be used after fork; use spawn (this process was forked from process ",
         process_, ", which had started CUDA)");
  }
  const char* name = nullptr;
  const char* text = nullptr;
  api_.cuGetErrorName(result, &name);
  api_.cuGetErrorString(result, &text);
  sagert_status status = result == CUDA_ERROR_OUT_OF_MEMORY ? SAGERT_ERROR_OUT_OF_MEMORY : SAGERT_ERROR_CUDA;
  fail(status, "the NVIDIA driver reported ", name != nullptr ? name : "an unknown error", " (", result, ", ",
       text != nullptr ? text : "no description", ") while ", doing);
}

ContextGuard::ContextGuard(const Driver& driver, CUcontext context) : driver_(driver) {
  CUcontext current = nullptr;
  driver_.check(driver_.api().cuCtxGetCurrent(&current), "reading the current context");
  if (current != context) {
    driver_.check(driver_.api().cuCtxPushCurrent(context), "making the device's primary context current");
    pushed_ = true;
  }
}

ContextGuard::~ContextGuard() {
  CUcontext popped = nullptr;
  if (pushed_) driver_.api().cuCtxPopCurrent(&popped);
}

RelaxedCapture::RelaxedCapture(const Driver& driver) : driver_(driver) {
  driver_.check(driver_.api().cuThreadExchangeStreamCaptureMode(&mode_), "exchanging the stream capture mode");
}

RelaxedCapture::~RelaxedCapture() { driver_.api().cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace sagert
