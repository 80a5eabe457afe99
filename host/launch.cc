// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "error.h"

namespace sagert {
namespace {

// Drivers before CUDA 12.3 cannot capture a programmatic dependency into a graph.
constexpr int32_t kDependentLaunchMin = 12030;

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
            KernelParameters& parameters, void* stream, bool may_overlap, int32_t cluster, int64_t parts) {
  if (blocks <= 0) return;
  if (cluster == 0) cluster = entry.cluster;
  parameters.hidden(entry.hidden_params);
  if (blocks > std::numeric_limits<int32_t>::max() || blocks % cluster != 0 || cluster > entry.cluster ||
      parameters.overflowed()) {
    fail(SAGERT_ERROR_INTERNAL, "kernel ", entry.file, " cannot be launched with ", blocks, " blocks in clusters of ",
         cluster, " and ", parameters.overflowed() ? "too many" : "these", " parameters");
  }
  CUlaunchAttribute attributes[2] = {};
  unsigned int attribute_count = 0;
  if (cluster > 1) {
    CUlaunchAttribute& attribute = attributes[attribute_count++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {static_cast<unsigned int>(cluster), 1, 1};
  }
  if (entry.dependent_launch != 0 && may_overlap && driver.version() >= kDependentLaunchMin) {
    CUlaunchAttribute& attribute = attributes[attribute_count++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned int>(blocks);
  config.gridDimY = static_cast<unsigned int>(parts);
  config.gridDimZ = 1;
  config.blockDimX = static_cast<unsigned int>(entry.threads);
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned int>(entry.shared);
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = attribute_count > 0 ? attributes : nullptr;
  config.numAttrs = attribute_count;
  // The driver takes a CUkernel wherever it takes a CUfunction of the current context.
  CUresult result =
      driver.api().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel), parameters.data(), nullptr);
  if (result != CUDA_SUCCESS) driver.raise(result, concat("launching kernel ", entry.file));
}

int64_t persistent_blocks(const Device& device, const KernelEntry& entry, int64_t tiles) {
  int64_t cluster = entry.cluster;
  int64_t resident = int64_t{device.info.multiprocessors} * entry.ctas_per_sm / cluster * cluster;
  int64_t needed = (tiles + cluster - 1) / cluster * cluster;
  return std::min(std::max(resident, cluster), needed);
}

}  // namespace sagert
