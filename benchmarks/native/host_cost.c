/* SPDX-License-Identifier: Apache-2.0 */
/* Nanoseconds of libsagert's calls: host_cost <precision number> <head_dim> <repetitions>. Prints one line per call:
 * its name, the least and the median of the batches. */
#include <math.h>
#include <sagert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { kBatches = 41, kCalls = 2000 };

static sagert_attention_args g_args;
static uint64_t g_bytes;
static sagert_attention_args g_kv_args; /* of quantizing K and V alone */
static sagert_kv_info g_info;

static int workspace_size(void) { return sagert_workspace_size(&g_args, &g_bytes); }
static int attention(void) { return sagert_attention(&g_args); }
static int both(void) { return workspace_size() | attention(); }
static int kv_plan(void) { return sagert_kv_plan(&g_kv_args, &g_info); }
static int quantize_kv(void) { return sagert_quantize_kv(&g_kv_args); }

static int by_value(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

static void measure(const char* name, int (*call)(void)) {
  double samples[kBatches];
  for (int batch = 0; batch < kBatches; ++batch) {
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < kCalls; ++i) {
      if (call() != SAGERT_OK) {
        fprintf(stderr, "%s: %s\n", name, sagert_last_error());
        exit(1);
      }
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    samples[batch] = ((double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec)) / kCalls;
  }
  qsort(samples, kBatches, sizeof(samples[0]), by_value);
  printf("%s %.1f %.1f\n", name, samples[0], samples[kBatches / 2]);
}

static sagert_tensor contiguous(uintptr_t address, int64_t heads, int64_t length, int64_t head_dim) {
  sagert_tensor tensor = {(void*)address, {heads * length * head_dim, length * head_dim, head_dim, 1}};
  return tensor;
}

int main(int argc, char** argv) {
  const int precision = argc > 1 ? atoi(argv[1]) : SAGERT_PRECISION_INT8_FP8;
  const int64_t head_dim = argc > 2 ? atoll(argv[2]) : 128;
  const int64_t length = 4096, heads = 32;
  g_args.struct_size = sizeof(g_args);
  g_args.batch = 2;
  g_args.heads_q = g_args.heads_kv = heads;
  g_args.seqlen_q = g_args.seqlen_k = length;
  g_args.head_dim = g_args.head_dim_v = head_dim;
  /* No driver in this benchmark reads memory. */
  g_args.q = contiguous(0x100000000u, heads, length, head_dim);
  g_args.k = contiguous(0x200000000u, heads, length, head_dim);
  g_args.v = contiguous(0x300000000u, heads, length, head_dim);
  g_args.out = contiguous(0x400000000u, heads, length, head_dim);
  g_args.workspace = (void*)(uintptr_t)0x10000000000u;
  g_args.workspace_size = (uint64_t)1 << 40;
  g_args.scale = 1.0 / sqrt((double)head_dim);
  g_args.dtype = SAGERT_DTYPE_BF16;
  g_args.precision = precision;
  measure("workspace_size", workspace_size);
  measure("attention", attention);
  measure("both", both);
  g_kv_args = g_args;
  g_kv_args.flags = SAGERT_FLAG_QUANTIZED_KV;
  g_kv_args.kv = g_args.workspace;
  g_info.struct_size = sizeof(g_info);
  measure("kv_plan", kv_plan);
  g_kv_args.row = g_info.row + 1;
  g_kv_args.kv_size = g_info.bytes;
  measure("quantize_kv", quantize_kv);
  return 0;
}
