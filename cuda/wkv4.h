// The WKV recurrence of RWKV-4 and its gradient, for one channel and one token, stated once for every device.
//
// State (a, b, p): the numerator a·e^p and the denominator b·e^p over all earlier tokens, with p a running maximum that keeps
// every exponential <= 1. A document starts at (0, 0, -1e38). Derivation, symbols and shapes: cuda/README.md.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define WKV_FN __device__ __forceinline__
#else
#define WKV_FN static inline __attribute__((always_inline))
#endif

constexpr float WKV_EMPTY = -1e38f;  // the running maximum of an empty state

struct WkvPair { float past, now; };  // e^(past - m), e^(now - m) with m = max(past, now)

// One of the two is 1, so a pair costs one exponential. Below e^-80 nothing survives in fp32; the clamp keeps the
// vector exponential on its fast path.
WKV_FN WkvPair wkv_pair(float past, float now) {
  const float d = past - now;
  const float e = expf(fmaxf(-fabsf(d), -80.0f));
  return {d >= 0 ? 1.0f : e, d >= 0 ? e : 1.0f};
}

// y of this token: a weighted mean of the v's so far, the current one with the bonus u.
WKV_FN float wkv4_output(float u, float k, float v, float a, float b, float p) {
  const WkvPair e = wkv_pair(p, u + k);
  return (e.past * a + e.now * v) / (e.past * b + e.now);
}

// The state after this token: decayed by w (<= 0), the current token added.
WKV_FN void wkv4_update(float w, float k, float v, float& a, float& b, float& p) {
  const float past = p + w;
  const WkvPair f = wkv_pair(past, k);
  a = f.past * a + f.now * v;
  b = f.past * b + f.now;
  p = fmaxf(past, k);
}

// One step of the backward pass. In: the state (a, b, p) before the token, gy = dL/dy, and (ga, gb) = dL/d(a, b) of the state after it.
// Out: gk, gv; gw and gu are added to; (ga, gb) become dL/d(a, b) of the state before the token. p is a scale and has no gradient.
WKV_FN void wkv4_backward(float w, float u, float k, float v, float a, float b, float p, float gy, float& ga, float& gb, float& gw,
                          float& gu, float& gk, float& gv) {
  const WkvPair f = wkv_pair(p + w, k);
  const WkvPair e = wkv_pair(p, u + k);
  const float scale = 1.0f / (e.past * b + e.now);
  const float y = (e.past * a + e.now * v) * scale;
  const float gnum = gy * scale;  // dL/d numerator of y
  const float gden = -gnum * y;   // dL/d denominator of y
  const float gbonus = e.now * (gnum * v + gden);
  gw += f.past * (ga * a + gb * b);
  gu += gbonus;
  gk = gbonus + f.now * (ga * v + gb);
  gv = e.now * gnum + f.now * ga;
  ga = f.past * ga + e.past * gnum;
  gb = f.past * gb + e.past * gden;
}
