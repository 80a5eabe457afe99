// SPDX-License-Identifier: Apache-2.0
// The tables the build writes from the manifests: what exists, where it runs, and the sha256 of every cubin.
#ifndef SAGERT_HOST_TABLE_H_
#define SAGERT_HOST_TABLE_H_

#include <cstdint>

namespace sagert {

// The kernels one attention call may launch.
enum Role : int32_t {
  kKvStats = 0,
  kQuantizeKv = 1,
  kQuantizeQ = 2,
  kAttention = 3,
  kCombine = 4,  // joins the parts of split keys; calls whose keys are not split do without it
  // Of the portable family's general rows: what a mask leaves of the keys, in front of attention; what infinities and
  // NaN of K and V make of the output, behind it.
  kScanMask = 5,
  kListBlocks = 6,
  kRepair = 7,
  kAttentionLse = 8,  // in place of attention where the LSE is wanted; rows without it have one kernel for both
  kRoleCount = 9
};

// One cubin.
struct KernelEntry {
  int32_t bundle;    // index into kBundles
  const char* file;  // name inside the bundle's folder
  const char* symbol;
  const char* signature;  // "name:type name:type ..." in parameter order, without the hidden tail
  int32_t hidden_params;  // trailing 64-bit parameters the compiler adds; pass 0
  int32_t threads;        // per block
  int32_t shared;         // dynamic shared memory, bytes
  int32_t static_shared;
  int32_t tile;              // rows of its input one program covers (BLOCK_M of attention)
  int32_t cluster;           // blocks per cluster, at most; 1: no clusters
  int32_t ctas_per_sm;       // of a kernel whose blocks take tiles in turns
  int32_t dependent_launch;  // 1: it may start before what is in front of it ends, and waits for that itself
  uint64_t length;           // bytes
  uint8_t sha256[32];
};

struct BundleEntry {
  const char* name;     // folder name
  const char* target;   // such as "sm_90a"
  const char* toolkit;  // such as "12.9"
  int32_t driver_min;
  int32_t kernel_count;
  int64_t bytes;
};

struct RowEntry {
  const char* id;
  int32_t bundle;
  const char* family;
  int32_t precision;  // SAGERT_PRECISION_*
  int32_t accuracy;   // SAGERT_ACCURACY_*
  int32_t rank;
  int32_t capability_min;
  int32_t capability_max;
  int32_t driver_min;
  uint32_t flags;   // SAGERT_FLAG_* it serves
  uint32_t dtypes;  // bit (1 << SAGERT_DTYPE_*)
  int64_t head_dim_max;
  int32_t any_head_dim_v;  // 1: head_dim_v need not be head_dim
  int64_t seqlen_max;
  double rel_l1_randn;
  const char* axes_json;
  const char* quant_json;
  int32_t rank_first;  // the row's entries of kRanks
  int32_t rank_count;
};

// A rank that replaces a row's own for some calls: the first entry that fits counts. Bounds are inclusive.
struct RankEntry {
  int32_t rank;
  int32_t causal;  // 0, 1, or -1 for both
  int64_t head_dim_min;
  int64_t head_dim_max;
  int64_t seqlen_q_min;
  int64_t seqlen_q_max;
  int64_t seqlen_k_min;
  int64_t seqlen_k_max;
  int64_t tiles_max;  // batch * heads_q * ceil(seqlen_q / 128)
};

// One point of a row's axes: the kernels that serve it, by role (-1: not needed).
struct VariantEntry {
  int32_t row;
  int32_t head_dim;  // padded head dim the kernels were built for
  int32_t causal;    // 0 or 1
  int32_t dtype;     // SAGERT_DTYPE_*
  int32_t kernels[kRoleCount];
};

// A precision that an architecture has no row for, and why: shown by explain.
struct AbsenceEntry {
  int32_t capability_min;
  int32_t capability_max;
  int32_t precision;
  const char* reason;
};

extern const BundleEntry kBundles[];
extern const int32_t kBundleCount;
extern const KernelEntry kKernels[];
extern const int32_t kKernelCount;
extern const RowEntry kRows[];
extern const int32_t kRowCount;
extern const RankEntry kRanks[];
extern const int32_t kRankCount;
extern const VariantEntry kVariants[];
extern const int32_t kVariantCount;
extern const AbsenceEntry kAbsences[];
extern const int32_t kAbsenceCount;

}  // namespace sagert

#endif  // SAGERT_HOST_TABLE_H_
