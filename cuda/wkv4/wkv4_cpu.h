// What the CPU unit's loops (one file per vector width) are given and what they offer. No header of the C++ library may be
// included here: its inline functions, compiled for a wide vector unit, could replace those that every processor runs.
#pragma once
#include <stdint.h>

#include "wkv4/wkv4_args.h"

struct Wkv4Problem {
  int64_t T, C;
  const float *w, *u;    // [C]
  const void *k, *v;     // [B, T, C], fp32 or bf16
  const uint8_t* reset;  // [B, T], not 0 where a document starts, or null
  const float* first;    // [B, 3, C], the incoming state, or null: the empty state
  const float* initial;  // [B, 3, C], the state that a reset returns to, or null: the empty state
  float* kept;           // [B, ceil(T / WKV4_KEEP) + 1, 3, C], the states before tokens 0, 16, 32, ... and after the last
};

struct Wkv4Outputs {
  void* y;               // [B, T, C], of the type of k
};

struct Wkv4Gradients {
  const void* y;         // [B, T, C], of the type of k: the gradients of the two outputs
  const float* last;     // [B, 3, C] or null
  float *w, *u;          // [B, C], summed over the batch by the caller
  void *k, *v;           // [B, T, C], of the type of k
  float *first, *initial; // [B, 3, C], of the states of those names; initial may be null
};

// Each runs channels [c, c + n) of batch row `row` over all of T. Work is best shared out in multiples of `block` channels.
struct Wkv4Loops {
  int64_t block;
  void (*forward[2])(const Wkv4Problem&, const Wkv4Outputs&, int64_t row, int64_t c, int64_t n);     // fp32, bf16
  void (*backward[2])(const Wkv4Problem&, const Wkv4Gradients&, int64_t row, int64_t c, int64_t n);  // fp32, bf16
};

extern const Wkv4Loops wkv4_loops_baseline;  // 16-byte vectors: what every processor of the architecture has
#ifdef __x86_64__
extern const Wkv4Loops wkv4_loops_avx2, wkv4_loops_avx512, wkv4_loops_avx512_bf16;
#endif
