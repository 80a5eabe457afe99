/* SPDX-License-Identifier: Apache-2.0 */
/* sagert.h: the C ABI of libsagert, quantized attention for NVIDIA GPUs.
 *
 *   out = softmax(scale * Q K^T + mask) V
 *
 * C types only, so that any language with C calls can be a caller. docs/c-abi.md is an introduction, examples/c a whole
 * program; this header is the contract.
 *
 * Axes: B batch, H query heads, Hk key/value heads, S query length, Sk key length, D head dim of Q and K, Dv of V and
 * the output. H is a multiple of Hk; query head h reads key/value head h / (H / Hk).
 *
 * Structs. Every struct a function takes starts with struct_size, which the caller sets to sizeof(struct), also where
 * the function fills the rest; zero the struct first, so that fields a program does not know keep their meaning (0 is
 * always "not asked for"). Later versions only append fields. A struct larger than the library's own is accepted and
 * read as far as the library knows it; one smaller than the first version's is refused. sagert_tensor is part of other
 * structs, has no size of its own and never changes. Sizes and strides are int64, strides count elements. No function
 * keeps a pointer to a struct, and none writes to one that is const.
 *
 * Errors. A function that returns sagert_status and not SAGERT_OK leaves a message for the calling thread, which
 * sagert_last_error gives: UTF-8, for people, perhaps of several lines; it names the argument or the driver's error and
 * what to change. Programs should look at the status only. Success leaves an earlier message as it was. Everything that
 * can be refused is refused before anything is launched, and no refusal leaves anything behind: the same call may be
 * made again. Errors of kernels that run later are the driver's to report, at the caller's next synchronization.
 *
 * Threads. Every function may be called from any thread at any time, sagert_close excepted. Calls that share a
 * workspace, args.kv or an output must be ordered by their streams. There is no lock on the way of a call whose kernels
 * have been loaded. After fork a process must not use CUDA; libsagert says so if it does.
 *
 * Loading. Loading libsagert touches no driver and no GPU. It opens the NVIDIA driver (libcuda.so.1) at the first call
 * that needs it, and finds its kernels, ../bundles beside its own file, at the first call that launches them; each is
 * checked against its sha256 before the driver sees it. No environment variable and no network plays a part.
 *
 * Device, context, stream. `device` is a CUDA ordinal, counted after CUDA_VISIBLE_DEVICES. Work runs in that device's
 * primary context, the one the CUDA runtime and PyTorch use; libsagert retains it at its first launch and keeps it to
 * the last sagert_close. The thread's current context is the same after a call as before. The stream is one of that
 * context; NULL is its legacy default stream. All memory must be accessible from the context. A call enqueues its
 * kernels and returns: inputs, output, workspace and kv must stay until the stream has passed them. Nothing is
 * allocated on the device, copied or synchronized.
 *
 * Graphs. Calls may be captured into a CUDA graph, the first one of a process included. A graph keeps the addresses and
 * sizes of the call it captured; buffers, the workspace too, must live as long as it is launched.
 *
 * Alignment. Elements of Q, K, V, out and mask to their own size, lse and cu_seqlens to 4 bytes, workspace and kv to
 * 256. Tensors whose rows start at multiples of 16 bytes (data, and strides of B, H and S in bytes; stride 1 along D)
 * and whose D and Dv are 64 or 128 are read and written fastest; all others work.
 *
 * Results. The same inputs, sizes, device and row give the same bits, whatever strides, stream and addresses. Rows that
 * see no key give 0 and a log-sum-exp of -inf.
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

/* Changes only when a program compiled against an older header must be compiled again. */
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

/* Element types. FP32 as the type of Q, K, V is known so that it can be refused by name: no row takes it. BOOL is a
 * byte, 0 or not; only a mask may be of it. */
enum { SAGERT_DTYPE_FP16 = 1, SAGERT_DTYPE_BF16 = 2, SAGERT_DTYPE_FP32 = 3, SAGERT_DTYPE_BOOL = 4 };

/* Number format of Q K^T, then of P V. A precision that is named is never replaced by another. AUTO chooses among rows
 * of accuracy class high and standard. A device may have no row of some. */
enum {
  SAGERT_PRECISION_AUTO = 0,
  SAGERT_PRECISION_INT8_FP16 = 1, /* P V in the 16-bit type of the inputs */
  SAGERT_PRECISION_INT8_FP8 = 2,
  SAGERT_PRECISION_INT8_INT8 = 3,
  SAGERT_PRECISION_INT4_FP8 = 4,
  SAGERT_PRECISION_NVFP4 = 5,
  SAGERT_PRECISION_INT4_FP16 = 6,
  SAGERT_PRECISION_INT4_INT8 = 7
};

/* By relative L1 error on N(0, 1) inputs: high at most 0.02, standard at most 0.045, low above. */
enum { SAGERT_ACCURACY_HIGH = 0, SAGERT_ACCURACY_STANDARD = 1, SAGERT_ACCURACY_LOW = 2 };

/* What a request asks for beyond plain attention. CAUSAL, WINDOW and MASK together mean: what all of them let through.
 * DROPOUT and GRAD exist so that front ends can ask for them and hear why not: no row serves them. */
enum {
  SAGERT_FLAG_CAUSAL = 1,         /* query i sees keys 0 .. i */
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
  int64_t batch;        /* 0 or more; with FLAG_VARLEN the number of sequences */
  int64_t heads_q;      /* 1 or more, a multiple of heads_kv */
  int64_t heads_kv;     /* 1 or more */
  int64_t seqlen_q;     /* 0 or more; with FLAG_VARLEN the longest */
  int64_t seqlen_k;     /* 0 or more; with FLAG_VARLEN the longest */
  int64_t head_dim;     /* 1 or more */
  int64_t head_dim_v;   /* 1 or more */
  int32_t dtype;        /* SAGERT_DTYPE_* of Q, K, V and the output */
  int32_t precision;    /* SAGERT_PRECISION_* */
  uint32_t flags;       /* SAGERT_FLAG_*; a bit the library does not know is an error */
  int32_t mask_dtype;   /* SAGERT_DTYPE_*, BOOL included; read only with FLAG_MASK */
  int64_t window_left;  /* keys before the query's own it sees, -1 for all; read only with FLAG_WINDOW */
  int64_t window_right; /* keys after it, -1 for all; read only with FLAG_WINDOW */
  int32_t row;          /* 0: the registry chooses; n: row n - 1 or none, as sagert_selection.row + 1 gives it */
  uint32_t reserved;    /* 0 */
} sagert_request;

/* A device, real (sagert_device_get) or described by the caller, who may leave all but capability and driver_version 0.
 */
typedef struct sagert_device {
  uint64_t struct_size;
  int32_t ordinal;
  int32_t capability;     /* 10 * major + minor, such as 90 */
  int32_t driver_version; /* CUDA version of the driver, 1000 * major + 10 * minor, such as 12080 */
  int32_t multiprocessors;
  int32_t shared_memory; /* largest dynamic shared memory of a block, bytes */
  int32_t reserved;      /* 0 */
  int64_t memory;        /* bytes */
  char name[128];        /* ends in 0 */
  uint8_t uuid[16];
} sagert_device;

/* A kernel row: one line of an architecture's manifest. Strings live as long as the library. */
typedef struct sagert_row {
  uint64_t struct_size;
  const char* id;         /* such as "sm90.wgmma.int8_fp8"; stays when rows are added */
  const char* bundle;     /* name of the bundle its kernels are in */
  const char* family;     /* the host code that launches it */
  int32_t precision;      /* SAGERT_PRECISION_*, never AUTO */
  int32_t accuracy;       /* SAGERT_ACCURACY_* */
  int32_t rank;           /* lower is preferred; for some requests a row has another, which sagert_explain gives */
  int32_t capability_min; /* inclusive */
  int32_t capability_max; /* inclusive */
  int32_t driver_min;     /* CUDA version of the oldest driver, such as 12000 */
  uint32_t flags;         /* SAGERT_FLAG_* this row serves */
  uint32_t dtypes;        /* bit (1 << SAGERT_DTYPE_*) */
  int64_t head_dim_max;   /* of head_dim and head_dim_v */
  double rel_l1_randn;    /* tolerated relative L1 error on N(0, 1) inputs against float64 attention */
  const char* axes_json;  /* the row's axes, as in the manifest */
  const char* quant_json; /* the row's quantization recipe, as in the manifest */
} sagert_row;

/* A bundle: the folder of cubins of one architecture. Strings live as long as the library, except path: to the thread's
 * next sagert_bundle_get. */
typedef struct sagert_bundle {
  uint64_t struct_size;
  const char* name;
  const char* target;   /* what it was assembled for, such as "sm_90a" */
  const char* toolkit;  /* CUDA version of the tools, such as "12.9" */
  const char* path;     /* absolute folder, whether it exists or not */
  int32_t driver_min;   /* CUDA version of the oldest driver that loads it */
  int32_t kernel_count; /* files */
  int64_t bytes;        /* of all of them */
} sagert_bundle;

/* Row indices are those of one build of the library: keep ids, not numbers. */
typedef struct sagert_selection {
  uint64_t struct_size;
  int32_t row;     /* index for sagert_row_get, -1 when none survived */
  int32_t variant; /* index of the compiled variant, stable within one build */
} sagert_selection;

/* A 4-D tensor in the order B, H, S, D whatever its memory layout. Any strides, negative ones included, and 0 in
 * inputs; elements of an output must not share memory, and an output must not overlap an input. The stride of a
 * dimension of size 1 is not read. */
typedef struct sagert_tensor {
  void* data;        /* device address of element [0, 0, 0, 0]; may be NULL where the tensor is empty */
  int64_t stride[4]; /* elements */
} sagert_tensor;

/* One attention: request and data. Fields up to head_dim_v, dtype, precision, flags, mask_dtype, row and the window are
 * those of sagert_request. */
typedef struct sagert_attention_args {
  uint64_t struct_size;
  int64_t batch;
  int64_t heads_q;
  int64_t heads_kv;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t head_dim;
  int64_t head_dim_v;
  sagert_tensor q;         /* [B, H, S, D] */
  sagert_tensor k;         /* [B, Hk, Sk, D]; not read with FLAG_QUANTIZED_KV */
  sagert_tensor v;         /* [B, Hk, Sk, Dv]; with FLAG_QUANTIZED_KV read only where sagert_kv_info.reads_v */
  sagert_tensor out;       /* [B, H, S, Dv]; every element is written */
  void* lse;               /* fp32 [B, H, S] contiguous: natural logarithm of the sum of exp of the scaled and masked
                              scores; written with FLAG_LSE, else not read and may be NULL */
  void* workspace;         /* device memory, 256-byte aligned; what it holds before and after means nothing, unless
                              sagert_quantize and sagert_attend share it; NULL where 0 bytes are needed */
  uint64_t workspace_size; /* bytes, at least what sagert_workspace_size says */
  void* stream;            /* CUstream of `device`'s primary context, or NULL */
  double scale;            /* multiplies Q K^T; finite. Usually 1 / sqrt(D): there is no default */
  int32_t dtype;
  int32_t precision;
  uint32_t flags;
  int32_t device; /* CUDA ordinal */

  /* FLAG_MASK: [B, H, S, Sk], any strides, 0 included. BOOL: not 0 attends. Otherwise added to the scaled scores. */
  sagert_tensor mask;
  int32_t mask_dtype;
  int32_t row;
  int64_t window_left;
  int64_t window_right;
  /* FLAG_VARLEN: int32 [batch + 1] in device memory, ascending from 0. batch counts sequences, seqlen_q and seqlen_k
   * are the longest ones; q, k, v, out are packed along the sequence (stride[0] is not read), total_q and total_k
   * elements of it; lse is [H, total_q]. The lengths themselves are not checked: that would take a synchronization. */
  const void* cu_seqlens_q;
  const void* cu_seqlens_k;
  int64_t total_q;
  int64_t total_k;
  /* What sagert_quantize_kv writes and FLAG_QUANTIZED_KV reads: device memory, 256-byte aligned, of exactly the
   * sagert_kv_info.bytes. Not read by other calls. */
  void* kv;
  uint64_t kv_size;
} sagert_attention_args;

/* What sagert_kv_plan says about K and V quantized once. */
typedef struct sagert_kv_info {
  uint64_t struct_size;
  uint64_t bytes;  /* of args.kv; 0 with a batch of 0 */
  int32_t row;     /* the row that reads them: args.row is this + 1 from here on; -1 when none serves */
  int32_t reads_v; /* 1: attention reads args.v, too, because this row leaves V as it is */
} sagert_kv_info;

/* Version of the library, such as "1.2.3", and SAGERT_ABI_VERSION as it was compiled: compare it before other calls. */
SAGERT_API const char* sagert_version(void);
SAGERT_API uint32_t sagert_abi_version(void);

/* Message of this thread's last failed call; never NULL, "" before any. Valid until the thread's next call. */
SAGERT_API const char* sagert_last_error(void);

/* sagert_open finds the driver; optional, since every call that needs it does. Counted: the last sagert_close unloads
 * the kernels and releases the contexts, after which the next call loads them again. No other call may be in progress
 * during the last sagert_close, and no kernel of libsagert be running or part of a graph that is used later. */
SAGERT_API sagert_status sagert_open(void);
SAGERT_API sagert_status sagert_close(void);

/* The driver's CUDA version, such as 12080, also of one too old to be used; the number of devices; one of them. */
SAGERT_API sagert_status sagert_driver_version(int32_t* version);
SAGERT_API sagert_status sagert_device_count(int32_t* count);
SAGERT_API sagert_status sagert_device_get(int32_t ordinal, sagert_device* device);

/* What the library contains, in table order. An index out of range is SAGERT_ERROR_INVALID_ARGUMENT. */
SAGERT_API int32_t sagert_row_count(void);
SAGERT_API sagert_status sagert_row_get(int32_t index, sagert_row* row);
SAGERT_API int32_t sagert_bundle_count(void);
SAGERT_API sagert_status sagert_bundle_get(int32_t index, sagert_bundle* bundle);

/* Re-hashes every file of a bundle. SAGERT_ERROR_INTEGRITY names the first file that is wrong. */
SAGERT_API sagert_status sagert_bundle_verify(int32_t index);

/* Chooses a row: a pure function of its arguments; needs no GPU and no driver. SAGERT_ERROR_UNSUPPORTED when none
 * serves the request, with every row's reasons in the message and selection->row -1. */
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

/* Bytes of workspace sagert_attention needs for these arguments. They depend on the sizes, dtype, precision, flags, row
 * and device and, where V is not quantized, on V's strides and the alignment of its address; other pointers may be
 * NULL. Needs the driver. Never more than is proportional to Q, K and V. */
SAGERT_API sagert_status sagert_workspace_size(const sagert_attention_args* args, uint64_t* bytes);

/* Attention: quantizes, then attends, on args->stream. */
SAGERT_API sagert_status sagert_attention(const sagert_attention_args* args);

/* The same in two steps. sagert_quantize reads q, k, v and fills the workspace; sagert_attend reads the workspace (and
 * q and v where the row leaves them as they are) and writes out and lse. Both take the same arguments. */
SAGERT_API sagert_status sagert_quantize(const sagert_attention_args* args);
SAGERT_API sagert_status sagert_attend(const sagert_attention_args* args);

/* K and V quantized once, for any number of calls whose queries meet them:
 *
 *   1. sagert_kv_plan(&args, &info): the row and the bytes. Needs the driver; k.data may be NULL, v.data must be the
 * one that will be quantized, since how it is aligned matters. A row that serves args.flags is chosen: name there what
 *      later calls will ask for (MASK, WINDOW, LSE, ...), all but CAUSAL, which any row of this kind serves.
 *   2. args.kv = memory of info.bytes, args.kv_size = info.bytes, args.row = info.row + 1.
 *   3. sagert_quantize_kv(&args) fills args.kv from k and v, on args.stream. It needs no workspace.
 *   4. sagert_attention with FLAG_QUANTIZED_KV, as often as wanted, with any q, out, seqlen_q, heads_q, scale, CAUSAL,
 *      LSE, mask and window that the row serves, and the workspace that sagert_workspace_size says for it, which is
 *      smaller by what args.kv holds. k is not read, and v only if info.reads_v: then with the strides of step 3.
 *
 * The output has the bits that one call with the same row gives. Steps 1 and 3 read batch, heads_kv, seqlen_k,
 * head_dim, head_dim_v, k, v, dtype, precision, row, device, flags, mask_dtype and the window, and nothing that
 * concerns queries. batch, heads_kv, seqlen_k, head_dim, head_dim_v, dtype and row must stay the same in step 4. A
 * buffer of another shape or row is told by its size, kv_size, and refused; what the memory holds cannot be checked.
 * NO_SMOOTH_K counts in step 3 only. FLAG_VARLEN is refused. Sizes: with D padded to 64 or 128 and Sk to a multiple of
 * 128, B * Hk * Sk * D bytes for K, as much again for V in 8 bits or, where 16-bit V has to be copied, twice as much,
 * and some percent for scales and statistics. */
SAGERT_API sagert_status sagert_kv_plan(const sagert_attention_args* args, sagert_kv_info* info);
SAGERT_API sagert_status sagert_quantize_kv(const sagert_attention_args* args);

#ifdef __cplusplus
}
#endif
#endif /* SAGERT_H_ */
