/* SPDX-License-Identifier: Apache-2.0 */
/* Attention through sagert's C ABI, checked against float64 attention computed here.
 *
 *   attention [int8_fp16|int8_fp8|int8_int8|int4_fp16|int4_fp8|int4_int8|auto] [bf16|fp16] [causal]
 *
 * Needs sagert.h, libsagert and, when it runs, an NVIDIA driver: no CUDA toolkit. The driver's functions are declared
 * below and found in libcuda.so.1. Exit status: 0 all well, 1 the result is wrong, 2 something could not be done.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <math.h>
#include <sagert.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B = 2, H = 4, HK = 2, S = 300, SK = 500, D = 128 };

/* ---- The driver ---- */

typedef uint64_t device_pointer;
static int (*cuInit)(unsigned);
static int (*cuDevicePrimaryCtxRetain)(void** context, int device);
static int (*cuDevicePrimaryCtxRelease)(int device);
static int (*cuCtxPushCurrent)(void* context);
static int (*cuMemAlloc)(device_pointer*, size_t);
static int (*cuMemFree)(device_pointer);
static int (*cuMemcpyHtoD)(device_pointer, const void*, size_t);
static int (*cuMemcpyDtoH)(void*, device_pointer, size_t);
static int (*cuStreamCreate)(void** stream, unsigned flags);
static int (*cuStreamSynchronize)(void* stream);
static int (*cuStreamDestroy)(void* stream);

static void fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

static void check_cuda(int result, const char* what) {
  char text[32];
  if (result == 0) return;
  snprintf(text, sizeof(text), "driver error %d", result);
  fail(what, text);
}

static void check(sagert_status status, const char* what) {
  if (status != SAGERT_OK) fail(what, sagert_last_error());
}

static void find(void* library, const char* name, void* function) {
  void* symbol = dlsym(library, name);
  if (symbol == NULL) fail("libcuda.so.1 lacks a symbol", name);
  memcpy(function, &symbol, sizeof(symbol)); /* C has no cast from an object's to a function's address */
}

static void open_driver(void) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == NULL) fail("no NVIDIA driver", dlerror());
  find(library, "cuInit", &cuInit);
  find(library, "cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain);
  find(library, "cuDevicePrimaryCtxRelease_v2", &cuDevicePrimaryCtxRelease);
  find(library, "cuCtxPushCurrent_v2", &cuCtxPushCurrent);
  find(library, "cuMemAlloc_v2", &cuMemAlloc);
  find(library, "cuMemFree_v2", &cuMemFree);
  find(library, "cuMemcpyHtoD_v2", &cuMemcpyHtoD);
  find(library, "cuMemcpyDtoH_v2", &cuMemcpyDtoH);
  find(library, "cuStreamCreate", &cuStreamCreate);
  find(library, "cuStreamSynchronize", &cuStreamSynchronize);
  find(library, "cuStreamDestroy_v2", &cuStreamDestroy);
}

/* cuMemAlloc aligns to 256 bytes, as sagert wants its workspace. */
static void* allocate(size_t bytes) {
  device_pointer address = 0;
  check_cuda(cuMemAlloc(&address, bytes > 0 ? bytes : 1), "allocating device memory");
  return (void*)(uintptr_t)address;
}

static void release(void* address) { check_cuda(cuMemFree((uintptr_t)address), "freeing device memory"); }

static void upload(void* to, const void* from, size_t bytes) {
  check_cuda(cuMemcpyHtoD((uintptr_t)to, from, bytes), "copying to the device");
}

static void download(void* to, const void* from, size_t bytes) {
  check_cuda(cuMemcpyDtoH(to, (uintptr_t)from, bytes), "copying from the device");
}

/* ---- Numbers ---- */

/* N(0, 1) from splitmix64, by Box and Muller. */
static double random_normal(void) {
  static uint64_t state = 1;
  double uniform[2];
  for (int i = 0; i < 2; ++i) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    uniform[i] = ((double)((z ^ z >> 31) >> 11) + 0.5) / 9007199254740992.0;
  }
  return sqrt(-2.0 * log(uniform[0])) * cos(6.283185307179586 * uniform[1]);
}

typedef struct format {
  int fraction_bits, bias, dtype;
} format;
static const format kBf16 = {7, 127, SAGERT_DTYPE_BF16}, kFp16 = {10, 15, SAGERT_DTYPE_FP16};

/* The nearest 16-bit number; values here are far from overflow. */
static uint16_t encode(double x, format f) {
  int exponent;
  const double mantissa = frexp(fabs(x), &exponent); /* in [0.5, 1) */
  const int lowest = 2 - f.bias;                     /* below it numbers lose bits */
  const int shift = exponent < lowest ? exponent - lowest : 0;
  const unsigned bits = (unsigned)rint(ldexp(mantissa, f.fraction_bits + 1 + shift));
  const unsigned field = (unsigned)(exponent < lowest ? 0 : exponent - lowest) << f.fraction_bits;
  return (uint16_t)((x < 0 ? 0x8000u : 0u) | (field + bits)); /* the leading bit of a normal number raises the field */
}

static double decode(uint16_t code, format f) {
  const int fraction = code & ((1 << f.fraction_bits) - 1);
  const int exponent = (code & 0x7fff) >> f.fraction_bits;
  const int bits = exponent > 0 ? fraction | 1 << f.fraction_bits : fraction;
  const double value = ldexp((double)bits, (exponent > 0 ? exponent : 1) - f.bias - f.fraction_bits);
  return code & 0x8000 ? -value : value;
}

/* Attention in float64: [B, H, S, D] from [B, H, S, D] and [B, HK, SK, D]. */
static void attend(const double* q, const double* k, const double* v, double* out, int causal) {
  static double weight[SK];
  for (int row = 0; row < B * H * S; ++row) {
    const int head = row / S, query = row % S;
    const int seen = causal && query + 1 < SK ? query + 1 : SK; /* aligned top left */
    const size_t first = (size_t)(head / H * HK + head % H / (H / HK)) * SK * D;
    double largest = -INFINITY, sum = 0.0;
    for (int key = 0; key < seen; ++key) {
      double score = 0.0;
      for (int d = 0; d < D; ++d) score += q[(size_t)row * D + d] * k[first + (size_t)key * D + d];
      weight[key] = score / sqrt((double)D);
      largest = fmax(largest, weight[key]);
    }
    for (int key = 0; key < seen; ++key) sum += weight[key] = exp(weight[key] - largest);
    for (int d = 0; d < D; ++d) {
      double total = 0.0;
      for (int key = 0; key < seen; ++key) total += weight[key] * v[first + (size_t)key * D + d];
      out[(size_t)row * D + d] = total / sum;
    }
  }
}

/* `count` random numbers, rounded to `f`, on the device and in *values. */
static void* make_tensor(size_t count, format f, double** values) {
  uint16_t* codes = malloc(count * sizeof(*codes));
  *values = malloc(count * sizeof(**values));
  if (codes == NULL || *values == NULL) fail("host memory", "ran out");
  for (size_t i = 0; i < count; ++i) {
    codes[i] = encode(random_normal(), f);
    (*values)[i] = decode(codes[i], f);
  }
  void* address = allocate(count * sizeof(*codes));
  upload(address, codes, count * sizeof(*codes));
  free(codes);
  return address;
}

/* ---- The calls ---- */

static sagert_tensor contiguous(void* data, int64_t heads, int64_t length) {
  const sagert_tensor tensor = {data, {heads * length * D, length * D, D, 1}};
  return tensor;
}

/* Runs the call with the workspace it asks for. The workspace may go as soon as the stream has passed the call. */
static void run(sagert_attention_args* args) {
  check(sagert_workspace_size(args, &args->workspace_size), "sagert_workspace_size");
  args->workspace = allocate(args->workspace_size);
  check(sagert_attention(args), "sagert_attention");
  check_cuda(cuStreamSynchronize(args->stream), "waiting for the stream");
  release(args->workspace);
}

/* Which row serves the call, which is then fixed: sagert_select needs no GPU, only a description of one. */
static sagert_row choose_row(sagert_attention_args* args) {
  sagert_device device = {.struct_size = sizeof(device)};
  sagert_selection selection = {.struct_size = sizeof(selection)};
  sagert_row row = {.struct_size = sizeof(row)};
  const sagert_request request = {
      .struct_size = sizeof(request),
      .batch = args->batch,
      .heads_q = args->heads_q,
      .heads_kv = args->heads_kv,
      .seqlen_q = args->seqlen_q,
      .seqlen_k = args->seqlen_k,
      .head_dim = args->head_dim,
      .head_dim_v = args->head_dim_v,
      .dtype = args->dtype,
      .precision = args->precision,
      .flags = args->flags,
  };
  check(sagert_device_get(args->device, &device), "sagert_device_get");
  check(sagert_select(&request, &device, &selection), "sagert_select");
  check(sagert_row_get(selection.row, &row), "sagert_row_get");
  args->row = selection.row + 1;
  printf("device      %s, compute capability %d.%d\n", device.name, device.capability / 10, device.capability % 10);
  printf("row         %s\n", row.id);
  return row;
}

static int parse_precision(const char* name) {
  static const struct {
    const char* name;
    int code;
  } known[] = {
      {"auto", SAGERT_PRECISION_AUTO},           {"int8_fp16", SAGERT_PRECISION_INT8_FP16},
      {"int8_fp8", SAGERT_PRECISION_INT8_FP8},   {"int8_int8", SAGERT_PRECISION_INT8_INT8},
      {"int4_fp16", SAGERT_PRECISION_INT4_FP16}, {"int4_fp8", SAGERT_PRECISION_INT4_FP8},
      {"int4_int8", SAGERT_PRECISION_INT4_INT8},
  };
  for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); ++i) {
    if (strcmp(name, known[i].name) == 0) return known[i].code;
  }
  fail("there is no such precision", name);
  return 0;
}

int main(int argc, char** argv) {
  const size_t q_count = (size_t)B * H * S * D, k_count = (size_t)B * HK * SK * D;
  const int precision = parse_precision(argc > 1 ? argv[1] : "auto");
  const format f = argc > 2 && strcmp(argv[2], "fp16") == 0 ? kFp16 : kBf16;
  const int causal = argc > 3 && strcmp(argv[3], "causal") == 0;

  open_driver();
  void *context, *stream;
  check_cuda(cuInit(0), "cuInit");
  check_cuda(cuDevicePrimaryCtxRetain(&context, 0), "retaining the device's context");
  check_cuda(cuCtxPushCurrent(context), "making the context current");
  check_cuda(cuStreamCreate(&stream, 0), "creating a stream"); /* waits for the copies below, and they for it */

  double *q, *k, *v;
  sagert_attention_args args = {.struct_size = sizeof(args)};
  args.batch = B;
  args.heads_q = H;
  args.heads_kv = HK;
  args.seqlen_q = S;
  args.seqlen_k = SK;
  args.head_dim = args.head_dim_v = D;
  args.q = contiguous(make_tensor(q_count, f, &q), H, S);
  args.k = contiguous(make_tensor(k_count, f, &k), HK, SK);
  args.v = contiguous(make_tensor(k_count, f, &v), HK, SK);
  args.out = contiguous(allocate(q_count * 2), H, S);
  args.scale = 1.0 / sqrt((double)D);
  args.dtype = f.dtype;
  args.precision = precision;
  args.flags = causal ? SAGERT_FLAG_CAUSAL : 0;
  args.device = 0;
  args.stream = stream;
  uint16_t* once = calloc(q_count, 2);
  uint16_t* result = calloc(q_count, 2);
  double* exact = malloc(q_count * sizeof(*exact));
  if (once == NULL || result == NULL || exact == NULL) fail("host memory", "ran out");
  upload(args.out.data, result, q_count * 2);
  const sagert_row row = choose_row(&args);

  /* One call: quantizes, then attends. */
  run(&args);
  download(result, args.out.data, q_count * 2);

  /* The same with K and V quantized beforehand, as for many queries that meet the same keys. */
  sagert_kv_info info = {.struct_size = sizeof(info)};
  const int twice = (row.flags & SAGERT_FLAG_QUANTIZED_KV) != 0; /* whether the row can */
  int identical = 1;
  if (twice) {
    check(sagert_kv_plan(&args, &info), "sagert_kv_plan");
    args.kv = allocate(info.bytes);
    args.kv_size = info.bytes;
    args.row = info.row + 1; /* the same here, where it was fixed before */
    check(sagert_quantize_kv(&args), "sagert_quantize_kv");
    args.flags |= SAGERT_FLAG_QUANTIZED_KV;
    upload(args.out.data, once, q_count * 2);
    run(&args);
    download(once, args.out.data, q_count * 2);
    identical = memcmp(once, result, q_count * 2) == 0;
    release(args.kv);
  }

  attend(q, k, v, exact, causal);
  double difference = 0.0, magnitude = 0.0;
  for (size_t i = 0; i < q_count; ++i) {
    difference += fabs(decode(result[i], f) - exact[i]);
    magnitude += fabs(exact[i]);
  }
  const double error = difference / magnitude;
  printf("relative L1 %.5f against float64, %.5f tolerated\n", error, row.rel_l1_randn);
  if (twice) {
    printf("K and V     quantized once take %llu bytes and give %s output\n", (unsigned long long)info.bytes,
           identical ? "the same" : "ANOTHER");
  } else {
    printf("K and V     cannot be quantized once for this row\n");
  }

  release(args.q.data);
  release(args.k.data);
  release(args.v.data);
  release(args.out.data);
  check_cuda(cuStreamDestroy(stream), "destroying the stream");
  check_cuda(cuDevicePrimaryCtxRelease(0), "releasing the context");
  free(q), free(k), free(v), free(once), free(result), free(exact);
  return error <= row.rel_l1_randn && identical ? 0 : 1;
}
