// What the launcher hands to every kernel of the CUDA unit. Read by NVRTC and by the host compiler alike.
#pragma once

#define WKV4_KEEP 16      // tokens per kept state
#define WKV4_THREADS 128  // per block

struct Wkv4Args {
  long long B, T, C;
  long long segment, segments;  // tokens per segment, a multiple of WKV4_KEEP; segments = ceil(T / segment) run in parallel
  const float *w, *u;           // [C]
  const void *k, *v;            // [B, T, C]
  const unsigned char* reset;   // [B, T], not 0 where a document starts, or null
  const float* first;           // [B, 3, C], the incoming state, or null: the empty state
  const float* initial;         // [B, 3, C], the state that a reset returns to, or null: the empty state
  float* kept;                  // [B, ceil(T / WKV4_KEEP), 3, C], the states before tokens 0, 16, 32, ...
  bool* cut;                    // [B, segments]: a document starts inside this segment, so that nothing passes through it
  void* y;                      // [B, T, C]
  float* last;                  // [B, 3, C], the outgoing state
  // The backward pass:
  const void* gy;               // [B, T, C]
  const float* glast;           // [B, 3, C] or null
  float* carry;                 // [B, segments, 3, C], see wkv4_summary_gradient and wkv4_scan_gradient
  float *gw, *gu;               // [B, segments, C], summed over both by the caller
  void *gk, *gv;                // [B, T, C]
  float* gfirst;                // [B, 3, C]
  float* ginitial;              // [B, segments, 3, C], summed over segments by the caller, or null
};
