// SPDX-License-Identifier: Apache-2.0
// The constraints a row puts on a request and a device. Each is a bit; the text of a bit is made only when shown.
#ifndef SAGERT_HOST_CONSTRAINTS_H_
#define SAGERT_HOST_CONSTRAINTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "sagert.h"
#include "table.h"

namespace sagert {

enum Constraint : uint32_t {
  kCapability = 1u << 0,
  kDriverVersion = 1u << 1,
  kPrecision = 1u << 2,
  kAccuracy = 1u << 3,
  kDtype = 1u << 4,
  kHeadDim = 1u << 5,
  kHeadDimV = 1u << 6,
  kSeqlen = 1u << 7,
  kGrid = 1u << 8,
  kVariant = 1u << 9,
  kRow = 1u << 10,
  kFlagShift = 16,  // bit (16 + n) stands for SAGERT_FLAG bit n
};

struct Reason {
  const char* code;
  std::string text;
  std::string remedy;  // the smallest change that removes it; empty when there is none
};

// The constraints of the row that the request or the device breaks; 0 when the row serves it.
uint32_t broken_constraints(const RowEntry& row, int32_t row_index, const sagert_request& request,
                            const sagert_device& device);

// The variant of the row that serves the request: the smallest padded head dim that holds it. -1 when there is none.
int32_t find_variant(int32_t row_index, const sagert_request& request);

// Reasons for the broken constraints, and the table's explanation where the architecture lacks the precision.
std::vector<Reason> describe(uint32_t broken, const RowEntry& row, const sagert_request& request,
                             const sagert_device& device);

}  // namespace sagert

#endif  // SAGERT_HOST_CONSTRAINTS_H_
