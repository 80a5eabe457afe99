// SPDX-License-Identifier: Apache-2.0
#include "family.h"

#include <cstring>

#include "error.h"
#include "families/mma.h"
#include "families/portable.h"
#include "families/wgmma.h"

namespace sagert {

const Family& find_family(const char* name) {
  if (std::strcmp(name, "mma") == 0) return mma_family();
  if (std::strcmp(name, "portable") == 0) return portable_family();
  if (std::strcmp(name, "wgmma") == 0) return wgmma_family();
  fail(SAGERT_ERROR_INTERNAL, "this library has no code for rows of family ", name);
}

}  // namespace sagert
