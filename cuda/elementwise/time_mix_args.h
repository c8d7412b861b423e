// Arguments of the kernels of the time-mix around WKV. Compiled by NVRTC and by the host compiler.
#pragma once

#define TIME_MIX_THREADS 128  // per block: four warps, each with one head of `slice` tokens
#define TIME_MIX_MAX_N 64     // largest head size: two elements per thread of a warp

struct TimeMixShape {
  long long tokens, H, N;  // tokens: B * T
  long long slice;         // tokens per warp
};

struct KeysArgs {
  TimeMixShape shape;
  const void *k, *v, *w, *a, *mix, *first;        // [tokens, H, N]; mix and first are null in block 0
  const float *w0, *a0, *v0, *k_k, *k_a;          // [H, N]; v0 is null in block 0
  float* w_out;                                   // [tokens, H, N]
  void *k_out, *v_out, *a_out, *b_out;            // [tokens, H, N]
  // Backward:
  const float* gw;                                // [tokens, H, N], as all of them
  const void *gk[2], *gv[2], *ga, *gb;            // two summands of the gradients of k and v
  void *gk_in, *gv_in, *gw_in, *ga_in, *gmix, *gfirst;
  float* sums;                                    // [slices, 5, H, N]: of w0, a0, v0, k_k, k_a; or null
};

struct HeadGateArgs {
  TimeMixShape shape;
  float eps;
  const void *y, *g;                // [tokens, H, N]
  const void *r, *k, *v;            // [tokens, H, N]; null in RWKV-5 and 6, whose gate is a silu
  const float *weight, *bias, *r_k; // [H, N]; r_k may be null
  void* out;                        // [tokens, H, N]
  // Backward:
  const void* gout;                 // [tokens, H, N]
  void *gy, *gg, *gr, *gk, *gv;     // [tokens, H, N]
  float* sums;                      // [slices, 3, H, N]: of weight, bias, r_k; or null
};
