// SPDX-License-Identifier: Apache-2.0
// Workspace layout and parameters are those of kernels/sm90/prepass.cu and attention.cu.
#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "../error.h"
#include "../launch.h"
#include "../request.h"
#include "../table.h"
#include "common.h"
#include "planned.h"
#include "tiled.h"

namespace sagert {
namespace {

using tiled::defect_of;
using tiled::kHalf;
using tiled::kWord;
using tiled::Pv;

constexpr int kRoles[] = {kQuantizeKv, kAttention, kAttentionLse, kCombine};  // in launch order; one attention each
constexpr int64_t kBlock = 128;                                               // keys per block of quantized K and V
constexpr int64_t kVectorElements = 8;  // what a tensor map needs strides to be multiples of
// The pre-pass reads V twice. It works on so many bytes at a time that the second reading comes from L2.
constexpr int64_t kPrepassL2Bytes = int64_t{40} << 20;
constexpr int64_t kPrepassBlocksPerSm = 2;
constexpr int64_t kMapStrideMax = int64_t{1} << 40;  // bytes, of a tensor map
constexpr int64_t kBlocksPerPart = 4;                // of keys, at least, where they are split
constexpr int64_t kPartsMax = 32;
constexpr int64_t kLeadingKeys = 4;      // of INT8 V: kernels/sm90/leading.cuh
constexpr int64_t kChannelsOfScale = 2;  // of INT8 V

// What the signatures of a variant's kernels say.
struct Traits {
  Pv pv = Pv::kFp8;
  bool can_split = false;  // the keys, for combine to join the parts
  bool lse_apart = false;  // calls that want the LSE have a kernel of their own
  std::string defect;      // not empty: the build and this file disagree
};

// Everything the kernels are told, worked out once per call.
struct Plan : tiled::Plan {
  int64_t parts = 1;                   // of the keys of every tile
  int64_t part_out = 0, part_lse = 0;  // offsets into memory.call
  bool queued = false;                 // there are more tiles than thread blocks, which take them from a counter
  int64_t counter = 0;                 // offset into memory.call
  CUtensorMap v_map{};

  int64_t all_tiles() const { return tiles * heads_q_total; }
  const void* next_tile() const { return queued ? call_at(counter) : nullptr; }
};

void place_buffers(Plan& plan) {
  Layout kv;
  Layout call;
  reserve_quantized(plan, kv);
  const int64_t rows = plan.heads_q_total * plan.args->seqlen_q;
  plan.part_out = call.reserve(plan.parts > 1, plan.parts * rows * plan.padded_head_dim * kWord);
  plan.part_lse = call.reserve(plan.parts > 1, (2 * plan.parts + 1) * rows * kWord);
  plan.counter = call.reserve(plan.queued, kWord);
  plan.memory = memory_of(*plan.args, kv, call);
}

// Whether a tensor map can describe V. It fills what lies beyond head_dim_v with zeros.
bool is_mappable(const sagert_tensor& v, const Strides& strides) {
  auto fits = [](int64_t stride) { return stride >= 0 && stride < kMapStrideMax / kHalf; };
  return has_aligned_rows(v, strides, kVectorElements) && fits(strides.b) && fits(strides.h) && fits(strides.s);
}

// Into how many parts the keys of every tile go: where the tiles are no more than half the multiprocessors, as many as
// leave each multiprocessor one part at most, so that the parts take a workspace of some 10 MB at most.
int64_t parts_of(const Plan& plan, const Device& device, int64_t tile) {
  const int64_t tiles = plan.all_tiles();
  if (2 * tiles > device.info.multiprocessors) return 1;
  const bool causal = (plan.args->flags & SAGERT_FLAG_CAUSAL) != 0;
  const int64_t seen = causal ? std::min(plan.blocks, ceil_div(plan.tiles * tile, kBlock)) : plan.blocks;
  const int64_t parts = std::min({device.info.multiprocessors / tiles, seen / kBlocksPerPart, kPartsMax});
  return std::max(parts, int64_t{1});
}

Plan plan_of(const Device& device, const sagert_attention_args& args, const VariantEntry& variant,
             const Traits& traits) {
  Plan plan;
  const KernelEntry& attention = kKernels[variant.kernels[kAttention]];
  begin_plan(plan, device, args, variant, traits.pv, kBlock, attention.tile);
  if (traits.can_split) plan.parts = parts_of(plan, device, attention.tile);
  plan.queued = plan.parts == 1 && plan.all_tiles() > persistent_blocks(device, attention, plan.all_tiles());
  plan_v(plan, is_mappable(args.v, plan.v), true);
  if (traits.pv == Pv::kInt8) {
    plan.leading_keys = kLeadingKeys;
    plan.v_units = true;
    plan.v_scale_channels = kChannelsOfScale;
  }
  place_buffers(plan);
  return plan;
}

// What the map of V is made of: the caller's tensor as attention reads it, or the padded copy.
struct MapKey {
  const void* data;
  uint64_t sizes[4];
  uint64_t byte_strides[3];
};

MapKey v_map_key(const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  auto u64 = [](int64_t value) { return static_cast<uint64_t>(value); };
  int64_t keys = args.seqlen_k;
  int64_t channels = args.head_dim_v;
  Strides strides = plan.v;
  const void* data = args.v.data;
  if (plan.copy_v) {
    keys = plan.blocks * kBlock;
    channels = plan.padded_head_dim;
    strides = {args.heads_kv * keys * channels, keys * channels, channels, 1};
    data = plan.kv_at(plan.v8);
  }
  return {data,
          {u64(channels), u64(keys), u64(args.heads_kv), u64(args.batch)},
          {u64(strides.s * kHalf), u64(strides.h * kHalf), u64(strides.b * kHalf)}};
}

// The driver takes longer to encode a map than the rest of a call takes, and a program's V often stays where it is:
// each thread keeps its last map, a pure function of the key.
void encode_v_map(const Driver& driver, Plan& plan) {
  static_assert(sizeof(MapKey) == 64, "compared byte by byte");
  struct LastMap {
    MapKey key;  // data is null in the beginning, but never in use
    CUtensorMap map;
  };
  thread_local LastMap last;
  MapKey key = v_map_key(plan);
  if (std::memcmp(&key, &last.key, sizeof(key)) != 0) {
    constexpr uint32_t kBox[] = {64, static_cast<uint32_t>(kBlock), 1, 1};  // 64 channels: the width of the swizzle
    constexpr uint32_t kSteps[] = {1, 1, 1, 1};
    CUtensorMap map;
    CUresult result = driver.api().cuTensorMapEncodeTiled(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(key.data), key.sizes, key.byte_strides, kBox, kSteps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    driver.check(result, "encoding the tensor map of V");
    last = {key, map};
  }
  plan.v_map = last.map;
}

// Blocks that share the K or V of a head: few when there are many heads, more when V that is read twice would not stay
// in L2, at most a key block each. The order of the statistics' sums depends on it, so it counts V only where V is
// always quantized: K becomes the same bits whatever a call needs of V.
int64_t prepass_cluster(const Device& device, const KernelEntry& kernel, const Plan& plan) {
  int64_t resident = device.info.multiprocessors * kPrepassBlocksPerSm;
  int64_t jobs = plan.heads_kv_total * (plan.pv == Pv::kIo ? 1 : 2);
  int64_t job_bytes = plan.blocks * kBlock * plan.padded_head_dim * kHalf;
  int64_t wanted = ceil_div(resident * 3, jobs * 4);
  if (plan.pv != Pv::kIo) wanted = std::max(wanted, ceil_div(resident * job_bytes, kPrepassL2Bytes));
  wanted = std::min({wanted, plan.blocks, int64_t{kernel.cluster}});
  int64_t cluster = 1;
  while (cluster < wanted && 2 * cluster <= kernel.cluster) cluster *= 2;
  return cluster;
}

// `next_tile`: the counter of the attention that follows, for the pre-pass to clear, or null.
template <typename Sink>
void pass_quantize_kv(Sink& sink, const Plan& plan, const void* next_tile) {
  sink.pointer("K", plan.args->k.data);
  sink.pointer("V", plan.args->v.data);
  pass_quantized(sink, plan);
  pass_kv_strides(sink, plan);
  sink.pointer("NextTile", next_tile);
}

template <typename Sink>
void pass_attention(Sink& sink, const Plan& plan) {
  pass_queries_and_keys(sink, plan);
  if (plan.pv == Pv::kIo) {
    sink.tensormap("VMap", plan.v_map);
  } else {
    sink.pointer("V8", plan.kv_at(plan.v8));
  }
  pass_results_and_sizes(sink, plan);
  pass_query_strides(sink, plan);
  sink.pointer("PartOut", plan.call_at(plan.part_out));
  sink.pointer("PartLse", plan.call_at(plan.part_lse));
  sink.pointer("NextTile", plan.next_tile());
}

// Where no pre-pass of the same call does.
void clear_counter(const Driver& driver, const Plan& plan) {
  const auto address = reinterpret_cast<CUdeviceptr>(plan.next_tile());
  driver.check(driver.api().cuMemsetD32Async(address, 0, 1, static_cast<CUstream>(plan.args->stream)),
               "clearing the counter of tiles");
}

template <typename Sink>
void pass_combine(Sink& sink, const Plan& plan) {
  const sagert_attention_args& args = *plan.args;
  sink.pointer("PartOut", plan.call_at(plan.part_out));
  sink.pointer("PartLse", plan.call_at(plan.part_lse));
  sink.pointer("Out", args.out.data);
  sink.pointer("Lse", plan.write_lse ? args.lse : args.workspace);
  sink.i32("seqlen_q", narrow(args.seqlen_q));
  sink.i32("heads_q", narrow(args.heads_q));
  sink.i32("heads_total", narrow(plan.heads_q_total));
  sink.i32("head_dim_v", narrow(args.head_dim_v));
  sink.i32("parts", narrow(plan.parts));
  pass_strides(sink, kOutStrides, plan.out);
  sink.i32("o_vec", plan.out_vec);
  sink.i32("write_lse", plan.write_lse);
}

Traits read_traits(const VariantEntry& variant) {
  Traits traits;
  if (variant.kernels[kQuantizeKv] < 0 || variant.kernels[kAttention] < 0 || variant.kernels[kKvStats] >= 0 ||
      variant.kernels[kQuantizeQ] >= 0) {
    traits.defect =
        concat("row ", kRows[variant.row].id, " must have the roles quantize_kv, attention and perhaps combine");
    return traits;
  }
  const KernelEntry& quantize = kKernels[variant.kernels[kQuantizeKv]];
  const KernelEntry& attention = kKernels[variant.kernels[kAttention]];
  traits.pv = tiled::pv_of(quantize, "V8");
  traits.can_split = variant.kernels[kCombine] >= 0;
  sagert_attention_args args{};
  args.heads_q = args.heads_kv = 1;
  Plan plan;
  plan.args = &args;
  plan.pv = traits.pv;
  ParameterList quantize_list;
  pass_quantize_kv(quantize_list, plan, nullptr);
  ParameterList attention_list;
  pass_attention(attention_list, plan);
  traits.defect = defect_of(quantize, quantize_list, traits.pv);
  if (traits.defect.empty()) traits.defect = defect_of(attention, attention_list, traits.pv);
  if (traits.defect.empty() && (quantize.tile != kBlock || attention.tile <= 0)) {
    traits.defect = concat("kernels ", quantize.file, " and ", attention.file, " have tiles ", quantize.tile, " and ",
                           attention.tile);
  }
  traits.lse_apart = variant.kernels[kAttentionLse] >= 0;
  if (traits.lse_apart && traits.defect.empty()) {
    const KernelEntry& other = kKernels[variant.kernels[kAttentionLse]];
    traits.defect = defect_of(other, attention_list, traits.pv);
    if (traits.defect.empty() && other.tile != attention.tile) {
      traits.defect =
          concat("kernels ", attention.file, " and ", other.file, " have tiles ", attention.tile, " and ", other.tile);
    }
  }
  if (traits.can_split && traits.defect.empty()) {
    const KernelEntry& combine = kKernels[variant.kernels[kCombine]];
    ParameterList combine_list;
    pass_combine(combine_list, plan);
    traits.defect = defect_of(combine, combine_list);
    if (traits.defect.empty() && combine.tile <= 0) traits.defect = concat("kernel ", combine.file, " has no tile");
  }
  return traits;
}

class Wgmma : public PlannedFamily<Traits, Plan> {
 public:
  Wgmma() : PlannedFamily("wgmma", read_traits) {}

 private:
  Plan make_plan(const Device& device, const sagert_attention_args& args, const VariantEntry& variant,
                 const Traits& traits) const override {
    return plan_of(device, args, variant, traits);
  }

  void enqueue(const Driver& driver, const Device& device, Plan& plan, const VariantEntry& variant,
               const Traits& traits, Phase phase) const override {
    const int attention = traits.lse_apart && plan.write_lse ? kAttentionLse : kAttention;
    const bool prepass = (phase & kPrepareKv) != 0, attend = (phase & kAttend) != 0;
    void* stream = plan.args->stream;
    if (attend && plan.pv == Pv::kIo) encode_v_map(driver, plan);
    auto needed = [&](int role) {
      const bool wanted = role == kQuantizeKv || role == attention || (role == kCombine && plan.parts > 1);
      return wanted && in_phase(role, phase);
    };
    launch_roles(driver, device, variant, kRoles, needed, [&](int role, CUkernel ready) {
      const KernelEntry& kernel = kKernels[variant.kernels[role]];
      KernelParameters parameters;
      if (role == kQuantizeKv) {
        pass_quantize_kv(parameters, plan, attend ? plan.next_tile() : nullptr);
        int64_t jobs = plan.heads_kv_total * (plan.v_jobs ? 2 : 1);
        int64_t cluster = prepass_cluster(device, kernel, plan);
        launch(driver, ready, kernel, jobs * cluster, parameters, stream, true, narrow(cluster));
      } else if (role == kCombine) {
        pass_combine(parameters, plan);
        int64_t blocks = ceil_div(plan.heads_q_total * plan.args->seqlen_q, kernel.tile);
        launch(driver, ready, kernel, blocks, parameters, stream, true);
      } else {
        if (plan.queued && !prepass) clear_counter(driver, plan);
        pass_attention(parameters, plan);
        int64_t blocks = persistent_blocks(device, kernel, plan.all_tiles());
        launch(driver, ready, kernel, blocks, parameters, stream, prepass, 0, plan.parts);
      }
    });
  }
};

}  // namespace

const Family& wgmma_family() {
  static const Wgmma* instance = new Wgmma;
  return *instance;
}

}  // namespace sagert
