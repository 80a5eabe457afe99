// SPDX-License-Identifier: Apache-2.0
#include "request.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "names.h"
#include "table.h"

namespace sagert {
namespace {

constexpr uint64_t kAlignment = 256;  // of the workspace and of quantized K and V
constexpr double kLog2E = 1.4426950408889634;

void check_sizes(const sagert_request& request) {
  struct Size {
    const char* name;
    int64_t value;
    int64_t lowest;
  };
  const Size sizes[] = {{"batch", request.batch, 0},          {"heads_q", request.heads_q, 1},
                        {"heads_kv", request.heads_kv, 1},    {"seqlen_q", request.seqlen_q, 0},
                        {"seqlen_k", request.seqlen_k, 0},    {"head_dim", request.head_dim, 1},
                        {"head_dim_v", request.head_dim_v, 1}};
  for (const Size& size : sizes) {
    if (size.value < size.lowest) fail_argument(size.name, " is ", size.value, "; it must be at least ", size.lowest);
  }
  if (request.heads_q % request.heads_kv != 0) {
    fail_argument("heads_q is ", request.heads_q, " and heads_kv is ", request.heads_kv,
                  "; heads_q must be a multiple of heads_kv");
  }
  auto check_product = [](const char* name, int64_t b, int64_t h, int64_t s, int64_t d) {
    int64_t count = 0;
    if (__builtin_mul_overflow(b, h, &count) || __builtin_mul_overflow(count, s, &count) ||
        __builtin_mul_overflow(count, d, &count) || count > std::numeric_limits<int64_t>::max() / 8) {
      fail_argument(name, " has the shape [", b, ", ", h, ", ", s, ", ", d, "], whose size overflows 64 bits");
    }
  };
  check_product("q", request.batch, request.heads_q, request.seqlen_q, request.head_dim);
  check_product("k", request.batch, request.heads_kv, request.seqlen_k, request.head_dim);
  check_product("v", request.batch, request.heads_kv, request.seqlen_k, request.head_dim_v);
  check_product("out", request.batch, request.heads_q, request.seqlen_q, request.head_dim_v);
}

struct TensorShape {
  const char* name;
  const sagert_tensor& tensor;
  int64_t size[4];
  int64_t element = 2;  // bytes

  bool empty() const { return size[0] == 0 || size[1] == 0 || size[2] == 0 || size[3] == 0; }
};

bool is_packed(const sagert_attention_args& args) { return (args.flags & SAGERT_FLAG_VARLEN) != 0; }

// [B, heads, S, dim], of packed sequences [1, heads, total, dim].
TensorShape shape_of(const char* name, const sagert_tensor& tensor, const sagert_attention_args& args, bool of_queries,
                     int64_t dim) {
  int64_t heads = of_queries ? args.heads_q : args.heads_kv;
  if (is_packed(args)) return {name, tensor, {1, heads, of_queries ? args.total_q : args.total_k, dim}};
  return {name, tensor, {args.batch, heads, of_queries ? args.seqlen_q : args.seqlen_k, dim}};
}

TensorShape k_of(const sagert_attention_args& args) { return shape_of("k", args.k, args, false, args.head_dim); }

TensorShape v_of(const sagert_attention_args& args) { return shape_of("v", args.v, args, false, args.head_dim_v); }

void check_tensor(const TensorShape& shape, bool written, Stage stage) {
  if (shape.empty()) return;
  auto address = reinterpret_cast<uintptr_t>(shape.tensor.data);
  if (address == 0 && stage == Stage::kRun) {
    fail_argument(shape.name, ".data is NULL, but the tensor is not empty");
  }
  if (address % static_cast<uintptr_t>(shape.element) != 0) {
    fail_argument(shape.name, ".data is not aligned to its ", 8 * shape.element, "-bit elements (address ",
                  shape.tensor.data, ")");
  }
  int64_t lowest = 0;
  int64_t highest = 0;
  for (int axis = 0; axis < 4; ++axis) {
    int64_t stride = shape.tensor.stride[axis];
    int64_t extent = 0;
    int64_t& end = stride < 0 ? lowest : highest;
    int64_t bytes = 0;
    if (__builtin_mul_overflow(shape.size[axis] - 1, stride, &extent) || __builtin_add_overflow(end, extent, &end) ||
        __builtin_mul_overflow(end, shape.element, &bytes)) {
      fail_argument(shape.name, ".stride[", axis, "] is ", stride, " for a size of ", shape.size[axis],
                    "; offsets would overflow 64 bits");
    }
    if (written && stride == 0 && shape.size[axis] > 1) {
      fail_argument(shape.name, ".stride[", axis, "] is 0 for a size of ", shape.size[axis],
                    "; elements of the output must not share memory");
    }
  }
}

void check_mask(const sagert_attention_args& args, Stage stage) {
  if ((args.flags & SAGERT_FLAG_MASK) == 0) return;
  int64_t element = args.mask_dtype == SAGERT_DTYPE_BOOL ? 1 : args.mask_dtype == SAGERT_DTYPE_FP32 ? 4 : 2;
  check_tensor({"mask", args.mask, {args.batch, args.heads_q, args.seqlen_q, args.seqlen_k}, element}, false, stage);
}

void check_packed(const sagert_attention_args& args, Stage stage) {
  if (!is_packed(args)) return;
  struct Side {
    const char* offsets_name;
    const void* offsets;
    const char* total_name;
    int64_t total;
    const char* longest_name;
    int64_t longest;
  };
  const Side sides[] = {{"cu_seqlens_q", args.cu_seqlens_q, "total_q", args.total_q, "seqlen_q", args.seqlen_q},
                        {"cu_seqlens_k", args.cu_seqlens_k, "total_k", args.total_k, "seqlen_k", args.seqlen_k}};
  for (const Side& side : sides) {
    if (side.total < 0) fail_argument(side.total_name, " is ", side.total, "; it must be at least 0");
    int64_t most = 0;
    if (!__builtin_mul_overflow(args.batch, side.longest, &most) && side.total > most) {
      fail_argument(side.total_name, " is ", side.total, ", but ", args.batch, " sequences of at most ",
                    side.longest_name, " = ", side.longest, " have ", most,
                    "; give the length of the longest sequence");
    }
    if (side.offsets == nullptr && stage == Stage::kRun && args.batch > 0) {
      fail_argument(side.offsets_name, " is NULL; it must be int32 [batch + 1] in device memory");
    }
    if (reinterpret_cast<uintptr_t>(side.offsets) % 4 != 0) {
      fail_argument(side.offsets_name, " is not aligned to its 32-bit elements (address ", side.offsets, ")");
    }
  }
}

}  // namespace

void check_content(const sagert_request& request) {
  check_sizes(request);
  if (request.dtype < SAGERT_DTYPE_FP16 || request.dtype > SAGERT_DTYPE_FP32) {
    fail_argument("dtype is ", request.dtype, ", which is none of SAGERT_DTYPE_FP16 (1), _BF16 (2), _FP32 (3)");
  }
  if (precision_name(request.precision) == nullptr) {
    fail_argument("precision is ", request.precision, ", which is none of SAGERT_PRECISION_*: 0 (auto) to ",
                  SAGERT_PRECISION_INT4_INT8, " (int4_int8)");
  }
  if ((request.flags & ~kAllFlags) != 0) {
    fail_argument("flags is ", request.flags,
                  ", which has bits that this library does not know: ", request.flags & ~kAllFlags);
  }
  if ((request.flags & SAGERT_FLAG_MASK) != 0 && dtype_name(request.mask_dtype) == nullptr) {
    fail_argument("mask_dtype is ", request.mask_dtype,
                  ", which is none of SAGERT_DTYPE_FP16 (1), _BF16 (2), _FP32 (3), _BOOL (4)");
  }
  constexpr uint32_t kPackedMask = SAGERT_FLAG_MASK | SAGERT_FLAG_VARLEN;
  if ((request.flags & kPackedMask) == kPackedMask) {
    fail_argument(
        "flags is ", request.flags,
        ", which has FLAG_MASK and FLAG_VARLEN; a mask needs sequences of one length, so drop one of the two");
  }
  if ((request.flags & SAGERT_FLAG_WINDOW) != 0) {
    if (request.window_left < -1) fail_argument("window_left is ", request.window_left, "; it must be at least -1");
    if (request.window_right < -1) fail_argument("window_right is ", request.window_right, "; it must be at least -1");
  }
  if (request.row < 0 || request.row > kRowCount) {
    fail_argument("row is ", request.row, "; it must be 0, or 1 more than the index of one of the ", kRowCount,
                  " rows");
  }
}

void check_request(const sagert_request* request) {
  check_struct(request, "request");
  check_content(*request);
  if (request->reserved != 0) fail_argument("request.reserved is ", request->reserved, "; it must be 0");
}

void check_device(const sagert_device* device) {
  check_struct(device, "device");
  if (device->capability < 10 || device->capability > 999) {
    fail_argument("device.capability is ", device->capability, "; it must be 10 * major + minor, such as 90");
  }
  if (device->driver_version < 1000) {
    fail_argument("device.driver_version is ", device->driver_version,
                  "; it must be 1000 * major + 10 * minor, such as 12080");
  }
  if (device->reserved != 0) fail_argument("device.reserved is ", device->reserved, "; it must be 0");
}

sagert_request request_of(const sagert_attention_args& args) {
  sagert_request request{};
  request.struct_size = sizeof(request);
  request.batch = args.batch;
  request.heads_q = args.heads_q;
  request.heads_kv = args.heads_kv;
  request.seqlen_q = args.seqlen_q;
  request.seqlen_k = args.seqlen_k;
  request.head_dim = args.head_dim;
  request.head_dim_v = args.head_dim_v;
  request.dtype = args.dtype;
  request.precision = args.precision;
  request.flags = args.flags;
  request.mask_dtype = args.mask_dtype;
  request.window_left = args.window_left;
  request.window_right = args.window_right;
  request.row = args.row;
  return request;
}

sagert_attention_args kv_args(const sagert_attention_args* args, Stage stage) {
  check_struct(args, "args");
  sagert_attention_args own = *args;
  own.struct_size = sizeof(own);
  own.heads_q = std::max(own.heads_kv, int64_t{1});
  own.seqlen_q = std::max(own.seqlen_k, int64_t{1});
  own.q = own.out = sagert_tensor{};
  own.lse = own.workspace = nullptr;
  own.workspace_size = 0;
  own.scale = 1.0;
  own.flags |= SAGERT_FLAG_QUANTIZED_KV;
  check_content(request_of(own));
  check_tensor(k_of(own), false, stage);
  check_tensor(v_of(own), false, stage);
  return own;
}

void check_operands(const sagert_attention_args& args, Stage stage) {
  if (!std::isfinite(args.scale) || !std::isfinite(static_cast<float>(args.scale * kLog2E))) {
    fail_argument("scale is ", args.scale, "; it must be finite in 32-bit floating point");
  }
  check_packed(args, stage);
  const TensorShape out = shape_of("out", args.out, args, true, args.head_dim_v);
  // Without queries there is nothing to compute, and k and v are not read.
  if (out.empty()) return;
  check_tensor(shape_of("q", args.q, args, true, args.head_dim), false, stage);
  check_mask(args, stage);
  if (has_quantized_kv(args)) {
    if (args.row == 0) {
      fail_argument("row is 0, but kv holds what one row quantized; set it to sagert_kv_info.row + 1");
    }
    check_tensor(v_of(args), false, Stage::kPlan);  // only some rows read it; check_kv sees when it is missing
  } else {
    check_tensor(k_of(args), false, stage);
    check_tensor(v_of(args), false, stage);
  }
  check_tensor(out, true, stage);
  if ((args.flags & SAGERT_FLAG_LSE) != 0) {
    if (args.lse == nullptr && stage == Stage::kRun) fail_argument("lse is NULL, but flags ask for it");
    if (reinterpret_cast<uintptr_t>(args.lse) % 4 != 0) {
      fail_argument("lse is not aligned to its 32-bit elements (address ", args.lse, ")");
    }
  }
}

void check_workspace(const sagert_attention_args& args, uint64_t needed) {
  if (needed == 0) return;
  if (args.workspace == nullptr) fail_argument("workspace is NULL; ", needed, " bytes are needed");
  if (reinterpret_cast<uintptr_t>(args.workspace) % kAlignment != 0) {
    fail_argument("workspace is not aligned to ", kAlignment, " bytes (address ", args.workspace, ")");
  }
  if (args.workspace_size < needed) {
    fail_argument("workspace_size is ", args.workspace_size, " bytes, but ", needed,
                  " are needed; ask sagert_workspace_size with the same arguments");
  }
}

void check_kv(const sagert_attention_args& args, uint64_t needed) {
  if (needed == 0) return;
  if (args.kv == nullptr) fail_argument("kv is NULL; ", needed, " bytes are needed");
  if (reinterpret_cast<uintptr_t>(args.kv) % kAlignment != 0) {
    fail_argument("kv is not aligned to ", kAlignment, " bytes (address ", args.kv, ")");
  }
  // Nothing in the buffer can be read here: its exact size is what tells other shapes, rows and forms of V apart.
  if (args.kv_size != needed) {
    fail_argument(
        "kv_size is ", args.kv_size, " bytes, but K and V of this call take exactly ", needed,
        "; pass kv_size as sagert_kv_plan gave it, with the row and the sizes of that call and, where it said "
        "reads_v, its v");
  }
}

}  // namespace sagert
