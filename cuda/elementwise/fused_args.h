// Arguments of the elementwise CPU loops and CUDA kernels. Compiled by NVRTC and by the host
// compiler.
#pragma once

#define FUSED_THREADS 128       // per block
#define FUSED_ROW_THREADS 1024  // at most, in kernels with a block as wide as a row: a multiple of 32
#define FUSED_LOSS_THREADS 512  // at most, for a row of logits: two blocks per SM, one of which reads while the other computes
#define FUSED_WIDTH 8           // elements per access of a GPU thread

enum FusedDtype { DTYPE_FP32, DTYPE_BF16, DTYPE_FP16 };

struct FusedNorm {
  long long D;
  const void* x;         // [N, D]
  const float *w, *b;    // [D]
  float eps;
  void* y;               // [N, D]
  float* stats;          // [N, 2]: mean, 1/σ
  // Backward:
  const void* gy;        // [N, D]
  void* gx;              // [N, D]
  float *gw, *gb;        // [D], sums over this range of rows, or null; kernels: [slices, D]
  // Kernels only:
  long long N, slice;    // rows, rows per partial sum
  int rows;              // per block
  int x_dtype, y_dtype;  // read by the _any kernels
};

struct FusedMix {
  long long T, D;
  int count;                   // mixes, at most 3
  const void* x;               // [B, T, D]
  const void* last;            // [B, D], the token before the first
  const void* initial;         // [B, D], the token before a document start
  const unsigned char* reset;  // [B, T], nonzero where a document starts, or null
  const float* mix;            // [count, D]
  void* y[3];                  // [B, T, D] each; kernels: null if only its dropout is wanted
  // Backward:
  const void* gy[3];
  void *gx, *glast;            // [B, T, D], [B, D]
  float* gmix;                 // [count, D], sum over this range of rows, or null; kernels: [B, slices of T, count, D]
  // Kernels only:
  long long B, slice;          // slice: tokens per thread
  int dtype;
  void* dropped[3];            // [B, T, D] each, dropout of y as by FusedEach, or null
  const long long* seed[3];    // in device memory
  unsigned below[3];
  float scale[3];
};

struct FusedGate {
  const void *r, *v;
  void* y;
  // Backward:
  const void* g;
  void *gr, *gv;
  // Kernels only:
  long long N;  // elements
  int dtype;
};

struct FusedLoss {
  long long V, stride;      // stride: elements from a row to the next, at least V
  void* logits;             // [N, V], overwritten with the gradient
  const long long* target;  // [N]
  float* stats;             // [N, 3]: the largest logit, Σ e^(logit − largest), the logit at the target
  float l2wrap;             // L2Wrap's factor
  bool gradient;
  int dtype;
};

// CPU only. At step t: step_size = lr / (1 − β₁^t) and bias_correction2_sqrt = √(1 − β₂^t). Weight decay
// d: decay_factor = 1 − lr·d (AdamW; else 1) or l2 = d (Adam; else 0). The gradient is multiplied by clip.
struct FusedAdam {
  float *p, *m, *v;  // parameters and moments, updated
  const float* g;
  unsigned short* copy;  // p rounded to bf16, or null
  float clip, l2, decay_factor, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps;
};

// Kernels only: squared ReLU (y of k), its gradient (y of g and k), and dropout (y of k).
struct FusedEach {
  long long N;
  const void *k, *g;
  void* y;
  bool add;  // y += dropout(k)
  const long long* seed;  // in device memory, so that each replay of a CUDA graph can use another one
  unsigned below;
  float scale;
  int dtype;
};
