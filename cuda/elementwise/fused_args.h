// What the fused operations' loops on CPUs and their kernels on GPUs are called with. Read by NVRTC and by the host compiler alike.
//
// "Stream" is the residual stream, "inside" what is inside a block; each has a dtype, and both may have the same. What only kernels read stands last.
#pragma once

#define FUSED_THREADS 128       // per block of the kernels
#define FUSED_ROW_THREADS 1024  // at most, where a block takes a row: a multiple of 32, no more than the row can use
#define FUSED_WIDTH 8           // neighbouring numbers that a GPU's thread takes at a time

enum FusedDtype { DTYPE_FP32, DTYPE_BF16, DTYPE_FP16 };

struct FusedNorm {
  long long D;
  const void* x;           // [N, D], of the stream
  const float *w, *b;      // [D]
  float eps;
  void* y;                 // [N, D], of the inside
  float* stats;            // [N, 2]: mean, 1/σ
  // The backward pass:
  const void *gy;          // [N, D]
  void* gx;                // [N, D], of the stream
  float *gw, *gb;          // [D], this range's share, or null; for kernels [slices, D]
  long long N, slice;      // rows in all, and rows that share a sum
  int stream, inside;      // dtypes, for kernels that take any
};

struct FusedMix {
  long long T, D;
  int count;                   // mixes, at most 3
  const void* x;               // [B, T, D]
  const void* last;            // [B, D], the token before the first
  const void* initial;         // [B, D], the token before one that starts a document
  const unsigned char* reset;  // [B, T], not 0 where a document starts, or null
  const float* mix;            // [count, D]
  void* y[3];                  // [B, T, D] each
  // The backward pass:
  const void* gy[3];
  void *gx, *glast;            // [B, T, D], [B, D]
  float* gmix;                 // [count, D], this range's share, or null; for kernels [B, slices of T, count, D]
  long long B, slice;          // tokens that a thread runs through
  int dtype;
};

struct FusedGate {
  const void *r, *v;
  void* y;
  // The backward pass:
  const void* g;
  void *gr, *gv;
  // Kernels only:
  long long N;             // elements
  int dtype;
};

struct FusedLoss {
  long long V;
  void* logits;            // [N, V], becomes the gradient
  const long long* target; // [N]
  float* stats;            // [N, 3]: the largest logit, Σ e^(logit − largest), the logit at the target
  float pull;              // L2Wrap's factor
  bool gradient;
  int dtype;
};

// Of loops alone. At step t: rate = lr / (1 − β₁^t), root = √(1 − β₂^t), take1 = 1 − β₁, keep2 = β₂, take2 = 1 − β₂, and of a decay d keep = 1 − lr·d (AdamW; else 1)
// or l2 = d (Adam; else 0). clip: what the gradient is multiplied by.
struct FusedAdam {
  float *p, *m, *v;        // weights and moments, updated
  const float* g;
  float clip, l2, keep, take1, keep2, take2, rate, root, eps;
};

// Of kernels alone: squared ReLU (y of k), its gradient (y of g and k), and dropout (y of k).
struct FusedEach {
  long long N;
  const void *k, *g;
  void* y;
  bool add;                // dropout is added to y
  unsigned seed, below;
  float scale;
  int dtype;
};
