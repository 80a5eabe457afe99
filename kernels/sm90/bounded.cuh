// SPDX-License-Identifier: Apache-2.0
// Where scores are bounded beforehand (bounds.cuh) there are blocks without row maxima. At head_dim 128 the tensor core
// has no time for more: attention is slower without them, and the pre-pass does without the norms.
#pragma once

#include "bounds.cuh"

namespace sagert {

constexpr bool is_bounded_at(int head_dim) { return kNormsOfK && head_dim == 64; }

}  // namespace sagert
