// The WKV recurrence of RWKV-4 and its gradient, for one channel and one token; shared by all
// devices.
//
// State (a, b, p): numerator a·e^p and denominator b·e^p over all earlier tokens, with p the
// running maximum, which keeps every exponential <= 1. A document starts at (0, 0, WKV_EMPTY).
// Derivation, symbols and shapes: cuda/README.md.
//
// The including file defines WKV_FN (function specifiers), wkv_float (a float, or a vector of
// floats for neighbouring channels), wkv_exp(x) for x <= 1 (x <= WKV_UNSCALED_MAX for the unscaled
// functions), wkv_max(x, y), wkv_negative_magnitude(x) = -|x| and wkv_divide(x, y). No include
// guard: it is included once per vector width, each time in its own namespace.

#define WKV_EMPTY (-1e38f)  // the running maximum of an empty state

struct WkvPair { wkv_float past, now; };  // e^(past - m), e^(now - m) with m = max(past, now)

// One of them is 1, so a pair costs one exponential. (now - now) is 0, or NaN if now is infinite,
// as e^(now - m) would be.
WKV_FN WkvPair wkv_pair(wkv_float past, wkv_float now) {
  const wkv_float d = past - now;
  const wkv_float e = wkv_exp(wkv_negative_magnitude(d));
  const wkv_float one = wkv_float{} + 1.0f;
  return {d >= 0 ? one : e, d >= 0 ? e : one + (now - now)};
}

// Appends tokens to the state (a, b, p): `decay` is their total log-decay, and (a1, b1, p1) the
// state they produce from the empty state. Returns the two factors.
WKV_FN WkvPair wkv4_combine(wkv_float decay, wkv_float a1, wkv_float b1, wkv_float p1, wkv_float& a, wkv_float& b,
                            wkv_float& p) {
  const wkv_float past = p + decay;
  const WkvPair f = wkv_pair(past, p1);
  a = f.past * a + f.now * a1;
  b = f.past * b + f.now * b1;
  p = wkv_max(past, p1);
  return f;
}

// Appends one token, whose state is (v, 1, k).
WKV_FN WkvPair wkv4_update(wkv_float w, wkv_float k, wkv_float v, wkv_float& a, wkv_float& b, wkv_float& p) {
  return wkv4_combine(w, v, wkv_float{} + 1.0f, k, a, b, p);
}

// y of this token: the weighted mean of all v so far, the current one weighted with the bonus u.
WKV_FN wkv_float wkv4_output(wkv_float u, wkv_float k, wkv_float v, wkv_float a, wkv_float b, wkv_float p) {
  const WkvPair e = wkv_pair(p, u + k);
  return wkv_divide(e.past * a + e.now * v, e.past * b + e.now);
}

// The gradient of y with respect to numerator and denominator.
struct WkvOutputGradient { WkvPair e; wkv_float num, den; };
WKV_FN WkvOutputGradient wkv4_output_gradient(wkv_float u, wkv_float k, wkv_float v, wkv_float a, wkv_float b,
                                              wkv_float p, wkv_float gy) {
  const WkvPair e = wkv_pair(p, u + k);
  const wkv_float scale = wkv_divide(wkv_float{} + 1.0f, e.past * b + e.now);
  const wkv_float y = (e.past * a + e.now * v) * scale;
  const wkv_float num = gy * scale;
  return {e, num, -(num * y)};
}

// One step of the backward pass. In: the state (a, b, p) before the token, the factors f of
// wkv4_update for it, gy = dL/dy, and (ga, gb) = dL/d(a, b) of the state after it. Out: gk, gv; gw
// and gu are accumulated; (ga, gb) become dL/d(a, b) of the state before it. p is a scale and has
// no gradient.
WKV_FN void wkv4_backward(WkvPair f, wkv_float u, wkv_float k, wkv_float v, wkv_float a, wkv_float b, wkv_float p,
                          wkv_float gy, wkv_float& ga, wkv_float& gb, wkv_float& gw, wkv_float& gu, wkv_float& gk,
                          wkv_float& gv) {
  const WkvOutputGradient g = wkv4_output_gradient(u, k, v, a, b, p, gy);
  const wkv_float bonus = g.e.now * (g.num * v + g.den);
  gw += f.past * (ga * a + gb * b);
  gu += bonus;
  gk = bonus + f.now * (ga * v + gb);
  gv = g.e.now * g.num + f.now * ga;
  ga = f.past * ga + g.e.past * g.num;
  gb = f.past * gb + g.e.past * g.den;
}

// ---- Unscaled steps ----
// For small keys the state is stored at p = 0: one exponential per token, e = e^k, instead of two, and
// no maximum. Requires |k| + |u| <= WKV_UNSCALED_MAX for every token, and p <= WKV_UNSCALED_MAX before.
// ew = e^w and eu = e^u are computed once.

// e^30 times a value of any reasonable size fits fp32's range, and so does its inverse. e^w is 0 below
// w = -87: it then multiplies at most e^30 and is lost beside at least e^-30.
#define WKV_UNSCALED_MAX 30.0f

// Converts (a, b) from scale e^from to scale e^to.
WKV_FN void wkv4_rescale(wkv_float from, wkv_float to, wkv_float& a, wkv_float& b) {
  const wkv_float factor = wkv_exp(from - to);
  a *= factor;
  b *= factor;
}

WKV_FN void wkv4_unscaled_update(wkv_float ew, wkv_float e, wkv_float v, wkv_float& a, wkv_float& b) {
  a = ew * a + e * v;
  b = ew * b + e;
}

WKV_FN wkv_float wkv4_unscaled_output(wkv_float eu, wkv_float e, wkv_float v, wkv_float a, wkv_float b) {
  const wkv_float now = eu * e;
  return wkv_divide(a + now * v, b + now);
}

// num and den as in WkvOutputGradient, den with the opposite sign.
WKV_FN void wkv4_unscaled_output_gradient(wkv_float eu, wkv_float e, wkv_float v, wkv_float a, wkv_float b,
                                          wkv_float gy, wkv_float& num, wkv_float& den) {
  const wkv_float now = eu * e, scale = wkv_divide(wkv_float{} + 1.0f, b + now);
  num = gy * scale;
  den = num * ((a + now * v) * scale);
}

// Like wkv4_backward, but accumulates `w` and `u`, which times ew and eu give gw and gu.
WKV_FN void wkv4_unscaled_backward(wkv_float ew, wkv_float eu, wkv_float e, wkv_float v, wkv_float a, wkv_float b,
                                   wkv_float gy, wkv_float& ga, wkv_float& gb, wkv_float& w, wkv_float& u,
                                   wkv_float& gk, wkv_float& gv) {
  wkv_float num, den;
  wkv4_unscaled_output_gradient(eu, e, v, a, b, gy, num, den);
  const wkv_float through = eu * num + ga;  // gradient of e·v
  w += ga * a + gb * b;
  u += e * (num * v - den);
  gk = e * (through * v + (gb - eu * den));
  gv = e * through;
  ga = ew * ga + num;
  gb = ew * gb - den;
}
