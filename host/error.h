// SPDX-License-Identifier: Apache-2.0
// The one exception type of libsagert, and building messages. Messages are built on error paths only.
#ifndef SAGERT_HOST_ERROR_H_
#define SAGERT_HOST_ERROR_H_

#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "sagert.h"

namespace sagert {

class Error : public std::exception {
 public:
  Error(sagert_status status, std::string message) : status_(status), message_(std::move(message)) {}
  sagert_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  sagert_status status_;
  std::string message_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(sagert_status status, const Parts&... parts) {
  throw Error(status, concat(parts...));
}

template <typename... Parts>
[[noreturn]] void fail_argument(const Parts&... parts) {
  throw Error(SAGERT_ERROR_INVALID_ARGUMENT, concat(parts...));
}

}  // namespace sagert

#endif  // SAGERT_HOST_ERROR_H_
