// SPDX-License-Identifier: Apache-2.0
// The extern "C" functions: no exception passes them; each becomes a status and this thread's message.
#include <cstring>
#include <mutex>
#include <new>
#include <string>

#include "bundle.h"
#include "driver.h"
#include "error.h"
#include "family.h"
#include "recent.h"
#include "registry.h"
#include "request.h"
#include "sagert.h"
#include "table.h"

#if !defined(SAGERT_VERSION)
#error "SAGERT_VERSION must be defined by the build, such as -DSAGERT_VERSION=\"1.2.3\""
#endif

namespace sagert {
namespace {

thread_local std::string t_last_error;
thread_local std::string t_bundle_path;

std::mutex g_open_mutex;
int64_t g_open_count = 0;

void remember(const char* message) noexcept {
  try {
    t_last_error = message;
  } catch (...) {
    t_last_error.clear();
  }
}

template <typename Body>
sagert_status guarded(Body&& body) noexcept {
  try {
    body();
    return SAGERT_OK;
  } catch (const Error& error) {
    remember(error.what());
    return error.status();
  } catch (const std::bad_alloc&) {
    remember("host memory ran out");
    return SAGERT_ERROR_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    remember(error.what());
    return SAGERT_ERROR_INTERNAL;
  } catch (...) {
    remember("unknown exception");
    return SAGERT_ERROR_INTERNAL;
  }
}

Selection select_or_fail(const sagert_request& request, const sagert_device& device) {
  Selection selection = select(request, device);
  if (selection.row < 0) throw Error(SAGERT_ERROR_UNSUPPORTED, explain_refusal(request, device));
  return selection;
}

// A call with its arguments checked, and what serves it.
struct Call {
  Call(const sagert_attention_args* args, Stage stage) {
    check_struct(args, "args");
    const sagert_request request = request_of(*args);
    const Selection* known = recall(request, args->device);
    if (known == nullptr) check_content(request);
    check_operands(*args, stage);
    driver = &Driver::get();
    device = &driver->device(args->device);
    if (known != nullptr) {
      selection = *known;
      return;
    }
    selection = select_or_fail(request, device->info);
    keep(request, args->device, selection);
  }

  const Family& family() const { return find_family(kRows[selection.row].family); }

  Driver* driver;
  Device* device;
  Selection selection;
};

bool is_empty(const sagert_attention_args& args) {
  bool no_queries = (args.flags & SAGERT_FLAG_VARLEN) != 0 && args.total_q == 0;
  return args.batch == 0 || args.seqlen_q == 0 || no_queries;
}

sagert_status attend(const sagert_attention_args* args, uint32_t phases) {
  return guarded([&] {
    const Call call(args, Stage::kRun);
    if (is_empty(*args)) return;
    if (has_quantized_kv(*args)) phases &= ~kPrepareKv;
    ContextGuard guard(*call.driver, call.driver->context(*call.device));
    call.family().run(*call.driver, *call.device, *args, call.selection.variant, static_cast<Phase>(phases));
  });
}

void check_index(int32_t index, int32_t count, const char* what) {
  if (index < 0 || index >= count) fail_argument(what, " index is ", index, "; there are ", count);
}

}  // namespace
}  // namespace sagert

using namespace sagert;

extern "C" {

const char* sagert_version(void) { return SAGERT_VERSION; }

uint32_t sagert_abi_version(void) { return SAGERT_ABI_VERSION; }

const char* sagert_last_error(void) { return t_last_error.c_str(); }

sagert_status sagert_open(void) {
  return guarded([] {
    std::lock_guard<std::mutex> lock(g_open_mutex);
    Driver::get();
    ++g_open_count;
  });
}

sagert_status sagert_close(void) {
  return guarded([] {
    std::lock_guard<std::mutex> lock(g_open_mutex);
    if (g_open_count == 0) fail_argument("sagert_close was called more often than sagert_open");
    if (--g_open_count > 0) return;
    Driver& driver = Driver::get();
    unload_kernels(driver);
    driver.release_contexts();
  });
}

sagert_status sagert_driver_version(int32_t* version) {
  return guarded([&] {
    if (version == nullptr) fail_argument("version is NULL");
    *version = Driver::query_version();
  });
}

sagert_status sagert_device_count(int32_t* count) {
  return guarded([&] {
    if (count == nullptr) fail_argument("count is NULL");
    *count = Driver::get().device_count();
  });
}

sagert_status sagert_device_get(int32_t ordinal, sagert_device* device) {
  return guarded([&] {
    check_struct(device, "device");
    uint64_t size = device->struct_size;
    *device = Driver::get().device(ordinal).info;
    device->struct_size = size;
  });
}

int32_t sagert_row_count(void) { return kRowCount; }

sagert_status sagert_row_get(int32_t index, sagert_row* row) {
  return guarded([&] {
    check_struct(row, "row");
    check_index(index, kRowCount, "row");
    const RowEntry& entry = kRows[index];
    row->id = entry.id;
    row->bundle = kBundles[entry.bundle].name;
    row->family = entry.family;
    row->precision = entry.precision;
    row->accuracy = entry.accuracy;
    row->rank = entry.rank;
    row->capability_min = entry.capability_min;
    row->capability_max = entry.capability_max;
    row->driver_min = entry.driver_min;
    row->flags = entry.flags;
    row->dtypes = entry.dtypes;
    row->head_dim_max = entry.head_dim_max;
    row->rel_l1_randn = entry.rel_l1_randn;
    row->axes_json = entry.axes_json;
    row->quant_json = entry.quant_json;
  });
}

int32_t sagert_bundle_count(void) { return kBundleCount; }

sagert_status sagert_bundle_get(int32_t index, sagert_bundle* bundle) {
  return guarded([&] {
    check_struct(bundle, "bundle");
    check_index(index, kBundleCount, "bundle");
    const BundleEntry& entry = kBundles[index];
    t_bundle_path = bundle_folder(index);
    bundle->name = entry.name;
    bundle->target = entry.target;
    bundle->toolkit = entry.toolkit;
    bundle->path = t_bundle_path.c_str();
    bundle->driver_min = entry.driver_min;
    bundle->kernel_count = entry.kernel_count;
    bundle->bytes = entry.bytes;
  });
}

sagert_status sagert_bundle_verify(int32_t index) {
  return guarded([&] {
    check_index(index, kBundleCount, "bundle");
    verify_bundle(index);
  });
}

sagert_status sagert_select(const sagert_request* request, const sagert_device* device, sagert_selection* selection) {
  return guarded([&] {
    check_struct(selection, "selection");
    selection->row = -1;
    selection->variant = -1;
    check_request(request);
    check_device(device);
    Selection chosen = select_or_fail(*request, *device);
    selection->row = chosen.row;
    selection->variant = chosen.variant;
  });
}

sagert_status sagert_explain(const sagert_request* request, const sagert_device* device, char* buffer,
                             uint64_t capacity, uint64_t* required) {
  return guarded([&] {
    check_request(request);
    check_device(device);
    if (buffer == nullptr && capacity != 0) fail_argument("buffer is NULL, but capacity is ", capacity);
    if (buffer == nullptr && required == nullptr) fail_argument("buffer and required are both NULL");
    std::string text = explain_json(*request, *device);
    uint64_t needed = text.size() + 1;
    if (required != nullptr) *required = needed;
    if (capacity == 0) return;
    uint64_t count = needed <= capacity ? text.size() : capacity - 1;
    std::memcpy(buffer, text.data(), count);
    buffer[count] = 0;
  });
}

sagert_status sagert_workspace_size(const sagert_attention_args* args, uint64_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) fail_argument("bytes is NULL");
    *bytes = 0;
    const Call call(args, Stage::kPlan);
    if (is_empty(*args)) return;
    *bytes = call.family().workspace_size(*call.device, *args, call.selection.variant);
  });
}

sagert_status sagert_attention(const sagert_attention_args* args) { return attend(args, kWhole); }

sagert_status sagert_quantize(const sagert_attention_args* args) { return attend(args, kPrepass); }

sagert_status sagert_attend(const sagert_attention_args* args) { return attend(args, kAttend); }

sagert_status sagert_kv_plan(const sagert_attention_args* args, sagert_kv_info* info) {
  return guarded([&] {
    check_struct(info, "info");
    info->bytes = 0;
    info->row = -1;
    info->reads_v = 0;
    sagert_attention_args own = kv_args(args, Stage::kPlan);
    Device& device = Driver::get().device(own.device);
    sagert_request request = request_of(own);
    Selection selection = select_or_fail(request, device.info);
    info->row = selection.row;
    if (own.batch == 0) return;
    const Family& family = find_family(kRows[selection.row].family);
    KvSize size = family.kv_size(device, own, quantizing_variant(selection, request));
    info->bytes = static_cast<uint64_t>(size.bytes);
    info->reads_v = size.reads_v;
  });
}

sagert_status sagert_quantize_kv(const sagert_attention_args* args) {
  return guarded([&] {
    sagert_attention_args own = kv_args(args, Stage::kRun);
    Driver& driver = Driver::get();
    Device& device = driver.device(own.device);
    sagert_request request = request_of(own);
    Selection selection = select_or_fail(request, device.info);
    if (own.batch == 0) return;
    const Family& family = find_family(kRows[selection.row].family);
    ContextGuard guard(driver, driver.context(device));
    family.run(driver, device, own, quantizing_variant(selection, request), kPrepareKv);
  });
}

}  // extern "C"
