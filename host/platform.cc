// SPDX-License-Identifier: Apache-2.0
#include "platform.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#include <unistd.h>
#endif

#include "error.h"

namespace sagert::platform {

#if defined(_WIN32)
namespace {

std::wstring widen(const std::string& text) {
  int size = MultiByteToWideChar(CP_UTF8, 0, text.c_str(), -1, nullptr, 0);
  std::wstring out(size > 0 ? size - 1 : 0, L'\0');
  if (size > 0) MultiByteToWideChar(CP_UTF8, 0, text.c_str(), -1, out.data(), size);
  return out;
}

std::string narrow(const std::wstring& text) {
  int size = WideCharToMultiByte(CP_UTF8, 0, text.c_str(), -1, nullptr, 0, nullptr, nullptr);
  std::string out(size > 0 ? size - 1 : 0, '\0');
  if (size > 0) WideCharToMultiByte(CP_UTF8, 0, text.c_str(), -1, out.data(), size, nullptr, nullptr);
  return out;
}

FILE* open_for_reading(const std::string& path) { return _wfopen(widen(path).c_str(), L"rb"); }

}  // namespace

const char* driver_library_name() { return "nvcuda.dll"; }

void* open_driver_library(std::string* reason) {
  // System folder only: a library of this name elsewhere must not be picked up.
  HMODULE module = LoadLibraryExW(L"nvcuda.dll", nullptr, LOAD_LIBRARY_SEARCH_SYSTEM32);
  if (module == nullptr) *reason = concat("Windows error ", GetLastError());
  return reinterpret_cast<void*>(module);
}

void* find_symbol(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

std::string library_folder() {
  HMODULE module = nullptr;
  wchar_t path[32768];
  if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                          reinterpret_cast<LPCWSTR>(&library_folder), &module) ||
      GetModuleFileNameW(module, path, 32768) == 0) {
    fail(SAGERT_ERROR_INTERNAL, "cannot find the folder of the sagert library: Windows error ", GetLastError());
  }
  std::string file = narrow(path);
  return file.substr(0, file.find_last_of("\\/"));
}

int64_t process_id() { return static_cast<int64_t>(GetCurrentProcessId()); }

#else
namespace {

FILE* open_for_reading(const std::string& path) { return std::fopen(path.c_str(), "rbe"); }

}  // namespace

const char* driver_library_name() { return "libcuda.so.1"; }

void* open_driver_library(std::string* reason) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* text = dlerror();
    *reason = text != nullptr ? text : "unknown reason";
  }
  return library;
}

void* find_symbol(void* library, const char* name) { return dlsym(library, name); }

std::string library_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&library_folder), &info) == 0 || info.dli_fname == nullptr) {
    fail(SAGERT_ERROR_INTERNAL, "cannot find the folder of the sagert library");
  }
  char* absolute = realpath(info.dli_fname, nullptr);
  if (absolute == nullptr) {
    fail(SAGERT_ERROR_INTERNAL, "cannot resolve the path of the sagert library, ", info.dli_fname, ": ",
         std::strerror(errno));
  }
  std::string file = absolute;
  std::free(absolute);
  return file.substr(0, file.rfind('/'));
}

int64_t process_id() { return static_cast<int64_t>(getpid()); }

#endif

bool read_file(const std::string& path, uint64_t max_bytes, std::vector<uint8_t>* content, std::string* reason) {
  FILE* file = open_for_reading(path);
  if (file == nullptr) {
    *reason = std::strerror(errno);
    return false;
  }
  content->clear();
  uint8_t buffer[65536];
  for (;;) {
    size_t count = std::fread(buffer, 1, sizeof(buffer), file);
    if (count == 0) break;
    content->insert(content->end(), buffer, buffer + count);
    if (content->size() > max_bytes) break;
  }
  bool failed = std::ferror(file) != 0;
  std::fclose(file);
  if (failed) *reason = "read error";
  if (!failed && content->size() > max_bytes) {
    *reason = concat("longer than ", max_bytes, " bytes");
    failed = true;
  }
  return !failed;
}

}  // namespace sagert::platform
