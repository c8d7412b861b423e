// The interface of the WKV7 CPU loops (one file per vector width). No C++ library header may be
// included here: the linker could replace the baseline copy of an inline function by one compiled
// for a wider vector unit.
#pragma once
#include <stdint.h>

#include "wkv7/wkv7_args.h"

enum { WKV7_MAX_N = 256 };  // largest head size

struct Wkv7Problem {
  int64_t T, H, N;                // N: head size, a multiple of 16
  const void *r, *k, *v, *a, *b;  // [B, T, H, N], fp32 or bf16
  const float* w;                 // [B, T, H, N], log-decay <= 0
  const uint8_t* reset;           // [B, T], nonzero where a document starts, or null
  const float* first;             // [B, H, N (value), N (key)], the incoming state; null: zeros
  const float* initial;           // the same, the state at a document start; null: zeros
  // [B, H, ceil(T / WKV7_SAVE_INTERVAL), N (key), N (value)], the states before tokens 0, 16, 32, ...
  float* saved;
};

struct Wkv7Outputs {
  void* y;      // [B, T, H, N], the dtype of r
  float* last;  // [B, H, N (value), N (key)], the state after the last token
};

struct Wkv7Gradients {
  const void* y;            // [B, T, H, N], the dtype of r: gradient of y
  const float* last;        // [B, H, N, N], gradient of the outgoing state, or null
  void *r, *k, *v, *a, *b;  // [B, T, H, N], the dtype of r
  float* w;                 // [B, T, H, N]
  float *first, *initial;   // [B, H, N, N]; initial may be null
};

// Each processes one head of one batch row over all of T, with `scratch` floats of workspace.
struct Wkv7Loops {
  void (*forward[2])(const Wkv7Problem&, const Wkv7Outputs&, int64_t row, int64_t head, float* scratch);  // fp32, bf16
  void (*backward[2])(const Wkv7Problem&, const Wkv7Gradients&, int64_t row, int64_t head, float* scratch);
};

inline int64_t wkv7_forward_scratch(int64_t N) { return N * N; }
inline int64_t wkv7_backward_scratch(int64_t N) { return (WKV7_SAVE_INTERVAL + 3) * N * N + WKV7_SAVE_INTERVAL * N; }

extern const Wkv7Loops wkv7_loops_baseline;  // 16-byte vectors
#ifdef __x86_64__
extern const Wkv7Loops wkv7_loops_avx2, wkv7_loops_avx512, wkv7_loops_avx512_bf16;
#endif
