// Arguments of one step of AdamW on a tensor; see adamw.h. Compiled by NVRTC and by the host
// compiler.
#pragma once

#define ADAMW_BLOCK 256    // elements that share an absmax, processed by a warp
#define ADAMW_WIDTH 8      // elements of a GPU thread
#define ADAMW_THREADS 256  // per block
#define ADAMW_WARPS (ADAMW_THREADS * ADAMW_WIDTH / ADAMW_BLOCK)

// At step t: step_size = lr / (1 − β₁^t), bias_correction2_sqrt = √(1 − β₂^t), decay_factor = 1 − lr·d
// for weight decay d.
struct AdamW {
  long long N;
  void* p;               // [N], updated
  const void* g;         // [N], in the dtype of p
  void *m, *v;           // [N] moments, updated: levels, or fp32
  float *m_max, *v_max;  // [blocks] absmax of the moments, updated; null: they are fp32
  const float* tables;   // [4, 256]: levels of m, bounds between them, the same of v
  const float* clip;     // [1] factor of the gradient; NaN: nothing is updated
  float decay_factor, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps;
  unsigned key;          // of the random bits
  int runs;              // GPU: blocks of elements per warp
  bool vectorized;       // GPU: whether p, g, m and v can be accessed 16 (8-bit: 8) bytes at a time
};
