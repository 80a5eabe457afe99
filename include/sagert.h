/* SPDX-License-Identifier: Apache-2.0 */
/* sagert.h: the C ABI of libsagert, quantized attention for NVIDIA GPUs.
 *
 * C types only. Every struct starts with its own size in bytes, which the caller sets to sizeof(struct); fields are
 * only ever appended, and a library reads no further than the size it was given. Sizes and strides are int64, strides
 * count elements. No function needs a GPU except the ones that say so; nothing is loaded before the first call that
 * needs it.
 *
 * Every function that returns sagert_status leaves a message for the calling thread (sagert_last_error) when the status
 * is not SAGERT_OK. All functions may be called from any thread.
 *
 * Axes: B batch, H query heads, Hk key/value heads, S query length, Sk key length, D head dim.
 */
#ifndef SAGERT_H_
#define SAGERT_H_

#include <stdint.h>

#if defined(_WIN32)
#if defined(SAGERT_BUILD)
#define SAGERT_API __declspec(dllexport)
#else
#define SAGERT_API __declspec(dllimport)
#endif
#else
#define SAGERT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SAGERT_ABI_VERSION 1u

typedef int32_t sagert_status;
enum {
  SAGERT_OK = 0,
  SAGERT_ERROR_INVALID_ARGUMENT = 1, /* the request is malformed: fix the call */
  SAGERT_ERROR_UNSUPPORTED = 2,      /* well formed, but no kernel row can serve it: see sagert_explain */
  SAGERT_ERROR_NO_DRIVER = 3,        /* the NVIDIA driver is absent, too old or has no device */
  SAGERT_ERROR_INTEGRITY = 4,        /* a bundle file is missing, cut short or altered */
  SAGERT_ERROR_CUDA = 5,             /* the driver reported an error */
  SAGERT_ERROR_OUT_OF_MEMORY = 6,    /* device or host memory ran out */
  SAGERT_ERROR_INTERNAL = 7          /* a bug in libsagert */
};

/* BOOL is a byte, 0 or not; only a mask may be of it. */
enum { SAGERT_DTYPE_FP16 = 1, SAGERT_DTYPE_BF16 = 2, SAGERT_DTYPE_FP32 = 3, SAGERT_DTYPE_BOOL = 4 };

/* Number format of Q K^T, then of P V. AUTO chooses among rows of accuracy class high and standard. */
enum {
  SAGERT_PRECISION_AUTO = 0,
  SAGERT_PRECISION_INT8_FP16 = 1, /* P V in the 16-bit type of the inputs */
  SAGERT_PRECISION_INT8_FP8 = 2,
  SAGERT_PRECISION_INT8_INT8 = 3,
  SAGERT_PRECISION_INT4_FP8 = 4,
  SAGERT_PRECISION_NVFP4 = 5
};

enum { SAGERT_ACCURACY_HIGH = 0, SAGERT_ACCURACY_STANDARD = 1, SAGERT_ACCURACY_LOW = 2 };

/* What a request asks for beyond plain attention. */
enum {
  SAGERT_FLAG_CAUSAL = 1,         /* query i sees keys 0..i */
  SAGERT_FLAG_LSE = 2,            /* write the natural-log log-sum-exp of the scaled scores */
  SAGERT_FLAG_MASK = 4,           /* an additive or boolean mask */
  SAGERT_FLAG_DROPOUT = 8,        /* dropout probability above 0 */
  SAGERT_FLAG_GRAD = 16,          /* the result must be differentiable */
  SAGERT_FLAG_NO_SMOOTH_K = 32,   /* quantize K as it is, without subtracting its mean */
  SAGERT_FLAG_VARLEN = 64,        /* packed sequences with cumulative lengths */
  SAGERT_FLAG_WINDOW = 128,       /* query i sees keys i - window_left .. i + window_right */
  SAGERT_FLAG_BOTTOM_RIGHT = 256, /* in CAUSAL and WINDOW, query i stands at key i + Sk - S instead of at key i */
  SAGERT_FLAG_QUANTIZED_KV = 512  /* K and V come from sagert_quantize_kv, in args.kv */
};

/* What is asked, without data: enough to choose a row. */
typedef struct sagert_request {
  uint64_t struct_size;
  int64_t batch;
  int64_t heads_q;
  int64_t heads_kv;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t head_dim;
  int64_t head_dim_v;
  int32_t dtype;        /* of Q, K, V and the output */
  int32_t precision;    /* SAGERT_PRECISION_* */
  uint32_t flags;       /* SAGERT_FLAG_* */
  int32_t mask_dtype;   /* SAGERT_DTYPE_*, BOOL included; read only with FLAG_MASK */
  int64_t window_left;  /* keys before the query's own it sees, -1 for all; read only with FLAG_WINDOW */
  int64_t window_right; /* keys after it, -1 for all */
  int32_t row;          /* 0: the registry chooses; n: row n - 1 or none, as sagert_selection.row + 1 gives it */
  uint32_t reserved;    /* 0 */
} sagert_request;

/* A device, real (sagert_device_get) or described by the caller. */
typedef struct sagert_device {
  uint64_t struct_size;
  int32_t ordinal;
  int32_t capability;     /* 10 * major + minor, such as 90 */
  int32_t driver_version; /* CUDA version of the driver, 1000 * major + 10 * minor, such as 12080 */
  int32_t multiprocessors;
  int32_t shared_memory; /* largest dynamic shared memory of a block, bytes */
  int32_t reserved;
  int64_t memory; /* bytes */
  char name[128];
  uint8_t uuid[16];
} sagert_device;

/* A kernel row: one line of an architecture's manifest. Strings are static. */
typedef struct sagert_row {
  uint64_t struct_size;
  const char* id;
  const char* bundle;
  const char* family;
  int32_t precision;
  int32_t accuracy;       /* SAGERT_ACCURACY_* */
  int32_t rank;           /* lower is preferred; for some requests a row has another, which sagert_explain gives */
  int32_t capability_min; /* inclusive */
  int32_t capability_max; /* inclusive */
  int32_t driver_min;
  uint32_t flags;  /* SAGERT_FLAG_* this row serves */
  uint32_t dtypes; /* bit (1 << SAGERT_DTYPE_*) */
  int64_t head_dim_max;
  double rel_l1_randn;    /* tolerated relative L1 error on N(0,1) inputs against float64 attention */
  const char* axes_json;  /* the row's axes, as in the manifest */
  const char* quant_json; /* the row's quantization recipe, as in the manifest */
} sagert_row;

/* A bundle: the folder of cubins of one architecture. Strings are static, or thread-local for path. */
typedef struct sagert_bundle {
  uint64_t struct_size;
  const char* name;
  const char* target;
  const char* toolkit;
  const char* path;
  int32_t driver_min;
  int32_t kernel_count;
  int64_t bytes;
} sagert_bundle;

typedef struct sagert_selection {
  uint64_t struct_size;
  int32_t row;     /* index for sagert_row_get, -1 when none survived */
  int32_t variant; /* index of the compiled variant, stable within one build */
} sagert_selection;

/* A 4-D tensor in the order B, H, S, D whatever its memory layout. Any strides, 0 included. */
typedef struct sagert_tensor {
  void* data;
  int64_t stride[4]; /* elements */
} sagert_tensor;

typedef struct sagert_attention_args {
  uint64_t struct_size;
  int64_t batch;
  int64_t heads_q;
  int64_t heads_kv;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t head_dim;
  int64_t head_dim_v;
  sagert_tensor q;   /* [B, H, S, D] */
  sagert_tensor k;   /* [B, Hk, Sk, D] */
  sagert_tensor v;   /* [B, Hk, Sk, Dv] */
  sagert_tensor out; /* [B, H, S, Dv] */
  void* lse;         /* fp32 [B, H, S] contiguous; read only with SAGERT_FLAG_LSE */
  void* workspace;   /* device memory, 256-byte aligned */
  uint64_t workspace_size;
  void* stream; /* CUstream of `device` */
  double scale; /* multiplies Q K^T */
  int32_t dtype;
  int32_t precision;
  uint32_t flags;
  int32_t device; /* CUDA ordinal */

  /* FLAG_MASK: [B, H, S, Sk], any strides, 0 included. BOOL: not 0 attends. Otherwise added to the scaled scores. */
  sagert_tensor mask;
  int32_t mask_dtype;
  int32_t row; /* as in sagert_request */
  /* FLAG_WINDOW: as in sagert_request. */
  int64_t window_left;
  int64_t window_right;
  /* FLAG_VARLEN: int32 [batch + 1] in device memory, ascending from 0. batch counts sequences, seqlen_q and seqlen_k
   * are the longest ones; q, k, v, out are packed along the sequence (stride[0] is not read), total_q and total_k
   * elements of it; lse is [H, total_q]. */
  const void* cu_seqlens_q;
  const void* cu_seqlens_k;
  int64_t total_q;
  int64_t total_k;
  /* What sagert_quantize_kv wrote and FLAG_QUANTIZED_KV reads: device memory, 256-byte aligned. */
  void* kv;
  uint64_t kv_size;
} sagert_attention_args;

/* What sagert_kv_plan says about K and V quantized once. */
typedef struct sagert_kv_info {
  uint64_t struct_size;
  uint64_t bytes;  /* of args.kv */
  int32_t row;     /* the row that reads them: args.row is this + 1 from here on */
  int32_t reads_v; /* 1: attention reads args.v, too, because this row leaves V as it is */
} sagert_kv_info;

SAGERT_API const char* sagert_version(void);
SAGERT_API uint32_t sagert_abi_version(void);

/* Message of this thread's last failed call; never NULL. Valid until the thread's next call. */
SAGERT_API const char* sagert_last_error(void);

/* Finds the driver and the bundles; optional, since every call that needs them does it. Counted: the last
 * sagert_close unloads the kernels, after which the next call loads them again. */
SAGERT_API sagert_status sagert_open(void);
SAGERT_API sagert_status sagert_close(void);

/* These three need the driver. */
SAGERT_API sagert_status sagert_driver_version(int32_t* version);
SAGERT_API sagert_status sagert_device_count(int32_t* count);
SAGERT_API sagert_status sagert_device_get(int32_t ordinal, sagert_device* device);

SAGERT_API int32_t sagert_row_count(void);
SAGERT_API sagert_status sagert_row_get(int32_t index, sagert_row* row);
SAGERT_API int32_t sagert_bundle_count(void);
SAGERT_API sagert_status sagert_bundle_get(int32_t index, sagert_bundle* bundle);

/* Re-hashes every file of a bundle. SAGERT_ERROR_INTEGRITY names the first file that is wrong. */
SAGERT_API sagert_status sagert_bundle_verify(int32_t index);

/* Chooses a row: a pure function of its arguments; needs no GPU and no driver. */
SAGERT_API sagert_status sagert_select(const sagert_request* request, const sagert_device* device,
                                       sagert_selection* selection);

/* The same, with every row's reasons, as a JSON object:
 *   {"request": {...}, "device": {...}, "selected": "<row id>" | null,
 *    "rows": [{"id": "...", "rank": <for this request>, "accepted": true|false,
 *              "reasons": [{"code": "...", "text": "..."}]}],
 *    "nearest": "<row id>" | null, "hint": "<smallest change that would make it run>" | null}
 * Writes at most capacity bytes, the final 0 included; *required receives the bytes needed. buffer may be NULL. */
SAGERT_API sagert_status sagert_explain(const sagert_request* request, const sagert_device* device, char* buffer,
                                        uint64_t capacity, uint64_t* required);

/* Bytes of workspace sagert_attention needs for these arguments (pointers other than inputs' may be NULL). */
SAGERT_API sagert_status sagert_workspace_size(const sagert_attention_args* args, uint64_t* bytes);

/* Attention: quantizes, then attends, on args->stream. Allocates no device memory and does not synchronize.
 * The caller's current context is left as it was. Needs a GPU. */
SAGERT_API sagert_status sagert_attention(const sagert_attention_args* args);

/* The same in two steps. sagert_quantize reads q, k, v and fills the workspace; sagert_attend reads the workspace (and
 * v where the precision leaves V as it is) and writes out and lse. Both take the same arguments. */
SAGERT_API sagert_status sagert_quantize(const sagert_attention_args* args);
SAGERT_API sagert_status sagert_attend(const sagert_attention_args* args);

/* K and V quantized once. */
SAGERT_API sagert_status sagert_kv_plan(const sagert_attention_args* args, sagert_kv_info* info);
SAGERT_API sagert_status sagert_quantize_kv(const sagert_attention_args* args);

#ifdef __cplusplus
}
#endif
#endif /* SAGERT_H_ */
