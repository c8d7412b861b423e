// The argument of every WKV6 kernel. Compiled by NVRTC and by the host compiler.
#pragma once

enum {
  WKV6_SAVE_INTERVAL = 64,  // tokens per saved state, on GPUs and CPUs
  WKV6_WARPS = 8,           // per block
  WKV6_STATES = 4,          // consecutive ones in registers at once in the backward pass
  WKV6_TILE = 16,           // elements of a state per thread
  WKV6_WORK = (WKV6_SAVE_INTERVAL / WKV6_STATES - 1) * WKV6_TILE * 32 * WKV6_WARPS
};

struct Wkv6Args {
  long long B, T, H, N;
  long long key_blocks;               // blocks per head and segment, which have different keys of its state
  long long segment, segments;        // tokens per segment, a multiple of WKV6_SAVE_INTERVAL; segments per sequence
  const void *r, *k, *v;              // [B, T, H, N]
  const float* w;                     // log-decay <= 0: [B, T, H, N], or [H, N] if constant
  const float* u;                     // [H, N]
  bool constant;                      // whether the decay does not depend on the token
  const unsigned char* reset;         // [B, T], nonzero where a document starts, or null
  const float* first;                 // [B, H, segments, N (key), N (value)], before each segment; null: zeros
  const float* initial;               // [B, H, N, N], the state at a document start; null: zeros
  float* saved;                       // [B, H, ceil(T / WKV6_SAVE_INTERVAL), N, N], the states before tokens 0, 64, ...
  void* y;                            // [key_blocks, B, T, H, N], summed over key_blocks by the caller
  float* last;                        // [B, H, N, N], the outgoing state
  // Backward:
  const void* gy;                     // [B, T, H, N]
  const float* glast;                 // [B, H, segments, N, N], of the state after each segment, or null
  float* work;                        // states between two saved ones: WKV6_WORK floats per block
  void *gr, *gk;                      // [B, T, H, N]
  void* gv;                           // as y
  float *gw, *gu;                     // gw [B, T, H, N], [segments, B, H, N] if constant; gu [segments, B, H, N]
  float* gfirst;                      // [B, H, N, N]
  float* ginitial;                    // [segments, B, H, N, N] or null
  // Several segments (wkv6_summary, wkv6_scan); `first` is [B, H, N, N] here, before the first segment:
  bool reverse;                       // from the last token to the first
  float* states;                      // [B, H, segments, N, N]
  float* decays;                      // [B, H, segments, N], the product of all e^w; -1 if a document starts
};
