// The interface of the WKV6 CPU loops (one file per vector width). No C++ library header may be
// included here: the linker could replace the baseline copy of an inline function by one compiled
// for a wider vector unit.
#pragma once
#include <stdint.h>

#include "wkv6/wkv6_args.h"

enum { WKV6_MAX_N = 256 };  // largest head size

struct Wkv6Problem {
  int64_t T, H, N;          // N: head size, a multiple of 16
  const void *r, *k, *v;    // [B, T, H, N], fp32 or bf16
  const float* w;           // log-decay <= 0: [B, T, H, N], or [H, N] if constant
  bool constant;            // whether the decay does not depend on the token
  const float* u;           // [H, N]
  const uint8_t* reset;     // [B, T], nonzero where a document starts, or null
  const float* first;       // [B, H, N (key), N (value)], the incoming state; null: zeros
  const float* initial;     // the same, the state at a document start; null: zeros
  float* saved;             // [B, H, ceil(T / WKV6_SAVE_INTERVAL), N, N], the states before tokens 0, 64, 128, ...
};

struct Wkv6Outputs {
  void* y;      // [B, T, H, N], the dtype of r
  float* last;  // [B, H, N, N], the state after the last token
};

struct Wkv6Gradients {
  const void* y;           // [B, T, H, N], the dtype of r: gradient of y
  const float* last;       // [B, H, N, N], gradient of the outgoing state, or null
  void *r, *k, *v;         // [B, T, H, N], the dtype of r
  float* w;                // [B, T, H, N]; [B, H, N] if the decay is constant
  float* u;                // [B, H, N]
  float *first, *initial;  // [B, H, N, N]; initial may be null
};

// Each processes one head of one batch row over all of T, with `scratch` floats of workspace.
struct Wkv6Loops {
  void (*forward[2])(const Wkv6Problem&, const Wkv6Outputs&, int64_t row, int64_t head, float* scratch);  // fp32, bf16
  void (*backward[2])(const Wkv6Problem&, const Wkv6Gradients&, int64_t row, int64_t head, float* scratch);
};

inline int64_t wkv6_forward_scratch(int64_t N) { return N * N; }
inline int64_t wkv6_backward_scratch(int64_t N) { return (WKV6_SAVE_INTERVAL + 1) * N * N; }

extern const Wkv6Loops wkv6_loops_baseline;  // 16-byte vectors
#ifdef __x86_64__
extern const Wkv6Loops wkv6_loops_avx2, wkv6_loops_avx512, wkv6_loops_avx512_bf16;
#endif
