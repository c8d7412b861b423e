// The fused operations on a CPU: what their loops (one file per vector width) offer. As in wkv4_cpu.h, no header of the C++ library.
#pragma once
#include <stdint.h>

// Pairs of dtypes, of the residual stream and of what is inside a block.
enum FusedPair { FUSED_FP32, FUSED_BF16, FUSED_FP32_BF16 };

struct FusedNorm {
  int64_t D;
  const void* x;           // [N, D], of the stream
  const float *w, *b;      // [D]
  float eps;
  void* y;                 // [N, D], of the inside
  float* stats;            // [N, 2]: mean, 1/σ
  // The backward pass:
  const void *gy, *past;   // [N, D] of the inside; of the stream, the gradient that flows past the norm, or null
  void* gx;                // [N, D], of the stream
  float *gw, *gb;          // [D], this range's share, or null
};

struct FusedMix {
  int64_t T, D;
  int count;               // mixes, at most 3
  const void* x;           // [B, T, D]
  const void* last;        // [B, D], the token before the first
  const uint8_t* reset;    // [B, T], not 0 where a document starts, or null
  const float* mix;        // [count, D]
  void* y[3];              // [B, T, D] each
  // The backward pass:
  const void* gy[3];
  void *gx, *glast;        // [B, T, D], [B, D]
  float* gmix;             // [count, D], this range's share, or null
};

struct FusedGate {
  const void *x, *r, *v;   // of the stream (or null), of the inside twice
  void* y;                 // of the stream where x is given, else of the inside
  const void* g;           // of y's dtype
  void *gr, *gv;
};

struct FusedLoss {
  int64_t V;
  void* logits;            // [N, V], becomes the gradient
  const int64_t* target;   // [N]
  float* stats;            // [N, 3]: the largest logit, Σ e^(logit − largest), the logit at the target
  float pull;              // L2Wrap's factor
  bool gradient;
};

// Each runs rows or elements [begin, end).
struct FusedLoops {
  const char* name;
  int64_t block;  // elements; ranges of elements begin at multiples of it
  void (*norm[3])(const FusedNorm&, int64_t begin, int64_t end);
  void (*norm_gradient[3])(const FusedNorm&, int64_t begin, int64_t end);
  void (*mix[2])(const FusedMix&, int64_t begin, int64_t end);
  void (*mix_gradient[2])(const FusedMix&, int64_t begin, int64_t end);
  void (*gate[3])(const FusedGate&, int64_t begin, int64_t end);
  void (*gate_gradient[3])(const FusedGate&, int64_t begin, int64_t end);
  void (*relu2[2])(const void* k, void* y, int64_t begin, int64_t end);
  void (*relu2_gradient[2])(const void* g, const void* k, void* gk, int64_t begin, int64_t end);
  // y = dropout(x), or y += dropout(x)
  void (*dropout[2])(const void* x, void* y, bool add, uint32_t seed, uint32_t below, float scale, int64_t begin, int64_t end);
  void (*loss[2])(const FusedLoss&, int64_t begin, int64_t end);
};

extern const FusedLoops fused_loops_baseline;
#ifdef __x86_64__
extern const FusedLoops fused_loops_avx2, fused_loops_avx512, fused_loops_avx512_bf16;
#endif
