// SPDX-License-Identifier: Apache-2.0
// Selection: request x device -> kernel row, or every row's reasons why not. Pure functions of the generated table.
#ifndef SAGERT_HOST_REGISTRY_H_
#define SAGERT_HOST_REGISTRY_H_

#include <cstdint>
#include <string>

#include "sagert.h"

namespace sagert {

struct Selection {
  int32_t row = -1;
  int32_t variant = -1;
};

// The best row that accepts the request, if any. Allocates nothing. Both arguments have been checked.
Selection select(const sagert_request& request, const sagert_device& device);

// The variant of the selected row whose pre-pass gives K and V all that any call of the row may read of them.
int32_t quantizing_variant(const Selection& selection, const sagert_request& request);

// The document of sagert_explain.
std::string explain_json(const sagert_request& request, const sagert_device& device);

// For people: the request, every row's reasons grouped, the nearest row and the smallest change.
std::string explain_refusal(const sagert_request& request, const sagert_device& device);

}  // namespace sagert

#endif  // SAGERT_HOST_REGISTRY_H_
