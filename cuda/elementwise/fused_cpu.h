// The interface of the elementwise CPU loops (one file per vector width). No header of the C++
// library; see wkv4_cpu.h.
#pragma once
#include <stdint.h>

#include "elementwise/fused_args.h"

// Dtypes of LayerNorm's input and output.
enum FusedPair { FUSED_FP32, FUSED_BF16, FUSED_FP32_BF16 };

// Each processes rows or elements [begin, end).
struct FusedLoops {
  int64_t block;  // elements; ranges begin at multiples of it
  void (*norm[3])(const FusedNorm&, int64_t begin, int64_t end);
  void (*norm_gradient[3])(const FusedNorm&, int64_t begin, int64_t end);
  void (*mix[2])(const FusedMix&, int64_t begin, int64_t end);
  void (*mix_gradient[2])(const FusedMix&, int64_t begin, int64_t end);
  void (*gate[2])(const FusedGate&, int64_t begin, int64_t end);
  void (*gate_gradient[2])(const FusedGate&, int64_t begin, int64_t end);
  void (*relu2[2])(const void* k, void* y, int64_t begin, int64_t end);
  void (*relu2_gradient[2])(const void* g, const void* k, void* gk, int64_t begin, int64_t end);
  // y = dropout(x), or y += dropout(x)
  void (*dropout[2])(const void* x, void* y, bool add, uint32_t seed, uint32_t below, float scale, int64_t begin,
                     int64_t end);
  // exps: buffer for one row, rounded up to `block`
  void (*loss[2])(const FusedLoss&, float* exps, int64_t begin, int64_t end);
  void (*adam)(const FusedAdam&, int64_t begin, int64_t end);
};

extern const FusedLoops fused_loops_baseline;
#ifdef __x86_64__
extern const FusedLoops fused_loops_avx2, fused_loops_avx512, fused_loops_avx512_bf16;
#endif
