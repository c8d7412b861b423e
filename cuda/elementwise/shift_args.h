// Arguments of the kernels of RWKV-6's token shift. Compiled by NVRTC and by the host compiler.
#pragma once

#define SHIFT_MAX 5  // mixtures of a token and its predecessor: for w, k, v, r, g

struct ShiftArgs {
  long long B, T, D;
  long long slice;             // tokens per thread
  int count;                   // mixtures, at most SHIFT_MAX
  int dtype;                   // of the tensors without one below; read by the _any kernels
  const void* x;               // [B, T, D]
  const void* last;            // [B, D], the token before the first
  const unsigned char* reset;  // [B, T], nonzero where a document starts (the token before is 0), or null
  const float* mix;            // [count, D]
  const void* parts;           // [count, B, T, D], the part of the weights that depends on the data
  void* y[SHIFT_MAX];          // [B, T, D] each, or null if only its dropout is wanted
  void* dropped[SHIFT_MAX];    // as in FusedMix, also the three below
  const long long* seed[SHIFT_MAX];
  unsigned below[SHIFT_MAX];
  float scale[SHIFT_MAX];
  // Backward:
  const void* gy[SHIFT_MAX];   // [B, T, D] each
  void *gx, *glast;            // [B, T, D], [B, D]
  void* gparts;                // [count, B, T, D]
  float* gmix;                 // [B, slices of T, count, D], or null
};
