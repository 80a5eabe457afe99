// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <limits>
#include <sstream>

#include "error.h"

namespace sagert {
namespace {

// "K:*bf16" to "K:*".
std::string without_pointee(const std::string& parameter) {
  size_t star = parameter.find('*');
  return star == std::string::npos ? parameter : parameter.substr(0, star + 1);
}

}  // namespace

bool matches_signature(const std::string& list, const char* signature) {
  std::istringstream expected(list);
  std::istringstream actual(signature);
  std::string left;
  std::string right;
  for (;;) {
    bool has_left = static_cast<bool>(expected >> left);
    bool has_right = static_cast<bool>(actual >> right);
    if (!has_left || !has_right) return has_left == has_right;
    if (left != without_pointee(right)) return false;
  }
}

std::string pointee(const char* signature, const char* name) {
  std::istringstream parameters(signature);
  std::string prefix = std::string(name) + ":*";
  for (std::string parameter; parameters >> parameter;) {
    if (parameter.compare(0, prefix.size(), prefix) == 0) return parameter.substr(prefix.size());
  }
  return "";
}

void launch(const Driver& driver, CUkernel kernel, const KernelEntry& entry, int64_t blocks,
            KernelParameters& parameters, void* stream) {
  if (blocks <= 0) return;
  parameters.hidden(entry.hidden_params);
  if (blocks > std::numeric_limits<int32_t>::max() || parameters.overflowed()) {
    fail(SAGERT_ERROR_INTERNAL, "kernel ", entry.file, " cannot be launched with ", blocks, " blocks and ",
         parameters.overflowed() ? "too many" : "these", " parameters");
  }
  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned int>(blocks);
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = static_cast<unsigned int>(entry.threads);
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned int>(entry.shared);
  config.hStream = static_cast<CUstream>(stream);
  // The driver takes a CUkernel wherever it takes a CUfunction of the current context.
  CUresult result =
      driver.api().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel), parameters.data(), nullptr);
  if (result != CUDA_SUCCESS) driver.raise(result, concat("launching kernel ", entry.file));
}

}  // namespace sagert
