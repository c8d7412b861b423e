// The argument of every WKV4 kernel. Compiled by NVRTC and by the host compiler.
#pragma once

#define WKV4_SAVE_INTERVAL 16  // tokens per saved state
#define WKV4_THREADS 128       // per block

struct Wkv4Args {
  long long B, T, C;
  // Tokens per segment, a multiple of WKV4_SAVE_INTERVAL; segments = ceil(T / segment) run in parallel.
  long long segment, segments;
  const float *w, *u;          // [C]
  const void *k, *v;           // [B, T, C]
  const unsigned char* reset;  // [B, T], nonzero where a document starts, or null
  const float* first;          // [B, 3, C], the incoming state; null: the empty state
  const float* initial;        // [B, 3, C], the state at a document start; null: the empty state
  float* saved;                // [B, ceil(T / WKV4_SAVE_INTERVAL), 3, C], the states before tokens 0, 16, 32, ...
  bool* has_reset;             // [B, segments]: a document starts in this segment
  void* y;                     // [B, T, C]
  float* last;                 // [B, 3, C], the outgoing state
  // Backward:
  const void* gy;              // [B, T, C]
  const float* glast;          // [B, 3, C] or null
  float* carry;                // [B, segments, 3, C], see wkv4_summary_gradient and wkv4_scan_gradient
  float *gw, *gu;              // [B, segments, C], summed by the caller
  void *gk, *gv;               // [B, T, C]
  float* gfirst;               // [B, 3, C]
  float* ginitial;             // [B, segments, 3, C], summed over segments by the caller, or null
};
