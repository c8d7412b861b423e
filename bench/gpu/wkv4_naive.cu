// The baseline of bench/gpu/wkv4.py: one thread per channel processes all of T, in blocks of 32
// threads. The backward pass first writes every state to `states`, then runs backward in time.
#define WKV_FN static __device__ __forceinline__
typedef float wkv_float;
WKV_FN float wkv_exp(float x) { return __expf(x); }
WKV_FN float wkv_max(float x, float y) { return fmaxf(x, y); }
WKV_FN float wkv_negative_magnitude(float x) { return -fabsf(x); }
WKV_FN float wkv_divide(float x, float y) { return __fdividef(x, y); }
#include "wkv4/wkv4.h"

#ifdef BF16
typedef unsigned short number;
WKV_FN float load(const number* p) { return __uint_as_float((unsigned)*p << 16); }
WKV_FN void store(number* p, float x) {
  const unsigned bits = __float_as_uint(x);
  *p = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
#else
typedef float number;
WKV_FN float load(const number* p) { return *p; }
WKV_FN void store(number* p, float x) { *p = x; }
#endif

extern "C" __global__ void naive_forward(long long B, long long T, long long C, const float* __restrict__ w_,
                                         const float* __restrict__ u_, const number* __restrict__ k,
                                         const number* __restrict__ v, number* __restrict__ y) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, b = i / C, c = i % C;
  if (b >= B) return;
  const float w = w_[c], u = u_[c];
  float a = 0, d = 0, p = WKV_EMPTY;
  for (long long t = 0; t < T; t++) {
    const long long at = (b * T + t) * C + c;
    const float kt = load(k + at), vt = load(v + at);
    store(y + at, wkv4_output(u, kt, vt, a, d, p));
    wkv4_update(w, kt, vt, a, d, p);
  }
}

extern "C" __global__ void naive_backward(long long B, long long T, long long C, const float* __restrict__ w_,
                                          const float* __restrict__ u_, const number* __restrict__ k,
                                          const number* __restrict__ v, const number* __restrict__ gy,
                                          float* __restrict__ states, float* __restrict__ gw, float* __restrict__ gu,
                                          number* __restrict__ gk, number* __restrict__ gv) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, b = i / C, c = i % C;
  if (b >= B) return;
  const float w = w_[c], u = u_[c];
  float a = 0, d = 0, p = WKV_EMPTY, ga = 0, gd = 0, sum_w = 0, sum_u = 0;
  for (long long t = 0; t < T; t++) {
    const long long at = (b * T + t) * C + c;
    float* s = states + (b * T + t) * 3 * C + c;
    s[0] = a, s[C] = d, s[2 * C] = p;
    wkv4_update(w, load(k + at), load(v + at), a, d, p);
  }
  for (long long t = T - 1; t >= 0; t--) {
    const long long at = (b * T + t) * C + c;
    const float* s = states + (b * T + t) * 3 * C + c;
    const float kt = load(k + at), vt = load(v + at);
    float to_k, to_v;
    wkv4_backward(wkv_pair(s[2 * C] + w, kt), u, kt, vt, s[0], s[C], s[2 * C], load(gy + at), ga, gd, sum_w, sum_u,
                  to_k, to_v);
    store(gk + at, to_k);
    store(gv + at, to_v);
  }
  gw[i] = sum_w;
  gu[i] = sum_u;
}
