// The argument of the WKV7 kernels in the chunk form, and their workspace. Compiled by NVRTC and by
// the host compiler.
#pragma once

enum {
  WKV7_CHUNK = 16,          // tokens; equal to WKV7_SAVE_INTERVAL, so that both forms save the same states
  WKV7_CHUNK_N = 64,        // the head size
  WKV7_CHUNK_THREADS = 128  // per block: a warp has 16 values, or 16 keys
};
enum { WKV7_FP32, WKV7_BF16, WKV7_FP16 };
enum { WKV7_AB, WKV7_AK, WKV7_RK, WKV7_RB, WKV7_INVERSE, WKV7_PAIRS };  // matrices [token, token]

// What a chunk does to any incoming state S [value, key]: with the names of cuda/README.md,
// SA = S sa^T + sa_own, Y = S y^T + y_own, and the outgoing state is S diag(decay) + SA^T b + V^T k.
struct alignas(16) Wkv7Chunk {
  float sa[WKV7_CHUNK][WKV7_CHUNK_N], sa_own[WKV7_CHUNK][WKV7_CHUNK_N];
  float y[WKV7_CHUNK][WKV7_CHUNK_N];
  float b[WKV7_CHUNK][WKV7_CHUNK_N], k[WKV7_CHUNK][WKV7_CHUNK_N];
  union {
    float y_own[WKV7_CHUNK][WKV7_CHUNK_N];             // forward
    float pairs[WKV7_PAIRS][WKV7_CHUNK][WKV7_CHUNK];   // backward
  };
  float decay[WKV7_CHUNK_N];
  int own;  // the first token whose document starts in this chunk; WKV7_CHUNK: none
};

struct Wkv7ChunkArgs {
  long long T, H;
  long long all_chunks;               // of a sequence
  long long begin, chunks;            // those of this launch
  int dtype;                          // of the tensors without one below
  int backward;                       // what `prepare` is for
  const void *r, *k, *v, *a, *b;      // [B, T, H, N]
  const float* w;                     // [B, T, H, N], log-decay, from LEAST (wkv7_chunk.h) to 0
  const unsigned char* reset;         // [B, T], nonzero where a document starts, or null
  const float* initial;               // [B, H, N (value), N (key)], the state at a document start; null: zeros
  Wkv7Chunk* work;                    // [B, H, chunks]
  float* saved;                       // [B, H, all_chunks, N, N], the state before each chunk
  // Scans: the state before the first chunk of the launch (null: zeros), or the gradient of the state after the
  // last one; and the same at the other end.
  const float* from;                  // [B, H, N, N]
  float* to;                          // [B, H, N, N]; may be `from`
  void* y;                            // [B, T, H, N]
  // Backward:
  const void* gy;                     // [B, T, H, N]
  float* gstates;                     // [B, H, chunks, N, N], the gradient of the state after each chunk
  float* ginitial;                    // [B, H, N, N], added to, or null
  void *gr, *gk, *gv, *ga, *gb;       // [B, T, H, N]
  float* gw;                          // [B, T, H, N]
};
