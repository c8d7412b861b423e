// The interface of the WKV4 CPU loops (one file per vector width). No C++ library header may be
// included here: the linker could replace the baseline copy of an inline function by one compiled
// for a wider vector unit.
#pragma once
#include <stdint.h>

#include "wkv4/wkv4_args.h"

struct Wkv4Problem {
  int64_t T, C;
  const float *w, *u;    // [C]
  const void *k, *v;     // [B, T, C], fp32 or bf16
  const uint8_t* reset;  // [B, T], nonzero where a document starts, or null
  const float* first;    // [B, 3, C], the incoming state; null: the empty state
  const float* initial;  // [B, 3, C], the state at a document start; null: the empty state
  // [B, ceil(T / WKV4_SAVE_INTERVAL) + 1, 3, C], the states before tokens 0, 16, 32, ... and after the last
  float* saved;
};

struct Wkv4Outputs {
  void* y;               // [B, T, C], the dtype of k
};

struct Wkv4Gradients {
  const void* y;         // [B, T, C], the dtype of k: gradient of y
  const float* last;     // [B, 3, C], gradient of the outgoing state, or null
  float *w, *u;          // [B, C], summed over the batch by the caller
  void *k, *v;           // [B, T, C], the dtype of k
  float *first, *initial; // [B, 3, C]; initial may be null
};

// Each processes channels [c, c + n) of batch row `row` over all of T. Split work at multiples of
// `block` channels.
struct Wkv4Loops {
  int64_t block;
  void (*forward[2])(const Wkv4Problem&, const Wkv4Outputs&, int64_t row, int64_t c, int64_t n);     // fp32, bf16
  void (*backward[2])(const Wkv4Problem&, const Wkv4Gradients&, int64_t row, int64_t c, int64_t n);  // fp32, bf16
};

extern const Wkv4Loops wkv4_loops_baseline;  // 16-byte vectors
#ifdef __x86_64__
extern const Wkv4Loops wkv4_loops_avx2, wkv4_loops_avx512, wkv4_loops_avx512_bf16;
#endif
