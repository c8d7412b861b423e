// Interface between the torch operator and the CPU loops of WKV7, which are compiled once per vector width. No header of the
// C++ library may be included here: its inline functions, compiled for wide vectors, could replace the portable ones.
#pragma once
#include <stdint.h>

enum { WKV7_CHUNK = 16 };    // tokens per saved state
enum { WKV7_MAX_N = 256 };   // largest head size

struct Wkv7Problem {
  int64_t T, H, N;                      // N: head size, a multiple of 16
  const void *r, *k, *v, *a, *b;        // [B, T, H, N], fp32 or bf16
  const float* w;                       // [B, T, H, N], log-decay <= 0
  const uint8_t* reset;                 // [B, T], nonzero where a document starts, or null
  const float *first, *initial;         // [B, H, N (value), N (key)]: the incoming state and the one a reset returns to; null: zeros
  float* saved;                         // [B, H, ceil(T / WKV7_CHUNK), N (key), N (value)]: the states before tokens 0, 16, 32, ...
};

struct Wkv7Outputs {
  void* y;      // [B, T, H, N], of the type of r
  float* last;  // [B, H, N (value), N (key)]: the state after the last token
};

struct Wkv7Gradients {
  const void* y;                // [B, T, H, N], of the type of r: the gradients of the two outputs
  const float* last;            // [B, H, N, N] or null
  void *r, *k, *v, *a, *b;      // [B, T, H, N], of the type of r
  float* w;                     // [B, T, H, N]
  float *first, *initial;       // [B, H, N, N]; initial may be null
};

// Each function runs one head of one batch row over all of T, in `scratch` floats of temporary memory.
struct Wkv7Loops {
  void (*forward[2])(const Wkv7Problem&, const Wkv7Outputs&, int64_t row, int64_t head, float* scratch);     // fp32, bf16
  void (*backward[2])(const Wkv7Problem&, const Wkv7Gradients&, int64_t row, int64_t head, float* scratch);  // fp32, bf16
};

inline int64_t wkv7_forward_scratch(int64_t N) { return N * N; }
inline int64_t wkv7_backward_scratch(int64_t N) { return (WKV7_CHUNK + 3) * N * N + WKV7_CHUNK * N; }

extern const Wkv7Loops wkv7_loops_baseline;
#ifdef __x86_64__
extern const Wkv7Loops wkv7_loops_avx2, wkv7_loops_avx512, wkv7_loops_avx512_bf16;
#endif
