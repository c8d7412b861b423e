// The argument of every WKV7 kernel. Compiled by NVRTC and by the host compiler.
#pragma once

enum {
  WKV7_SAVE_INTERVAL = 16,  // tokens per saved state, on GPUs and CPUs
  WKV7_WARP_ROWS = 8,       // rows of a state per warp
  WKV7_WARPS = 8,           // per block, so that a block has the 64 rows of a head of the usual size
  WKV7_WIDE_WARPS = 4       // per block of wkv7_gradient_128 and _256, to fit 48 KiB of shared memory
};

struct Wkv7Args {
  long long B, T, H, N;
  long long row_blocks;               // blocks per head, which have different rows of its state
  const void *r, *k, *v, *a, *b;      // [B, T, H, N]
  const float* w;                     // [B, T, H, N], log-decay <= 0
  const unsigned char* reset;         // [B, T], nonzero where a document starts, or null
  const float *first, *initial;       // [B, H, N (value), N (key)]: incoming, at a document start; null: zeros
  float* saved;                       // [B, H, ceil(T / WKV7_SAVE_INTERVAL), N, N], the states before tokens 0, 16, ...
  void* y;                            // [B, T, H, N]
  float* last;                        // [B, H, N, N], the outgoing state
  // Backward:
  const void* gy;                     // [B, T, H, N]
  const float* glast;                 // [B, H, N, N] or null
  float* work;                        // states between two saved ones: wkv7_work_floats() per block
  void *gr, *gk, *ga, *gb;            // [row_blocks, B, T, H, N], summed over row_blocks by the caller
  float* gw;                          // likewise
  void* gv;                           // [B, T, H, N]
  float *gfirst, *ginitial;           // [B, H, N, N]; ginitial may be null
};

// Tokens whose states are in registers at once in the backward pass, for heads up to this width.
#ifdef __CUDACC_RTC__
#define WKV7_SIZE static constexpr __host__ __device__
#else
#define WKV7_SIZE constexpr
#endif
WKV7_SIZE int wkv7_states(int width) { return 256 / width; }
WKV7_SIZE long long wkv7_work_floats(int width, int warps) {
  return (WKV7_SAVE_INTERVAL / wkv7_states(width) - 1) * (long long)width * warps * WKV7_WARP_ROWS;
}
