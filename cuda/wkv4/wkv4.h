// The WKV recurrence of RWKV-4 and its gradient, for one channel and one token, stated once for every device.
//
// State (a, b, p): the numerator a·e^p and the denominator b·e^p over all earlier tokens, with p a running maximum that keeps
// every exponential <= 1. A document starts at (0, 0, WKV_EMPTY). Derivation, symbols and shapes: cuda/README.md.
//
// Before this file is included, a unit defines WKV_FN (how a function is declared), wkv_float (a float, or a vector of floats of
// neighbouring channels) and wkv_exp(x) for x <= 1 (where no scale is used for x <= WKV_SMALL), wkv_max(x, y), wkv_negative_magnitude(x) = -|x|, wkv_divide(x, y) on it. It has
// no include guard: the CPU unit includes it once per vector width, each in a namespace of its own.

#define WKV_EMPTY (-1e38f)  // the running maximum of an empty state

struct WkvPair { wkv_float past, now; };  // e^(past - m), e^(now - m) with m = max(past, now)

// One of the two is 1, so a pair costs one exponential. (now - now) is 0, and NaN where now is infinite, as e^(now - m) is.
WKV_FN WkvPair wkv_pair(wkv_float past, wkv_float now) {
  const wkv_float d = past - now;
  const wkv_float e = wkv_exp(wkv_negative_magnitude(d));
  const wkv_float one = wkv_float{} + 1.0f;
  return {d >= 0 ? one : e, d >= 0 ? e : one + (now - now)};
}

// The state of a stretch of tokens (a, b, p) becomes that of the stretch and of what follows it, where `decay` is the
// log-decay over what follows and (a1, b1, p1) the state that what follows leaves if it starts empty. The two factors are returned.
WKV_FN WkvPair wkv4_join(wkv_float decay, wkv_float a1, wkv_float b1, wkv_float p1, wkv_float& a, wkv_float& b, wkv_float& p) {
  const wkv_float past = p + decay;
  const WkvPair f = wkv_pair(past, p1);
  a = f.past * a + f.now * a1;
  b = f.past * b + f.now * b1;
  p = wkv_max(past, p1);
  return f;
}

// The state after one more token, which alone is (v, 1, k).
WKV_FN WkvPair wkv4_update(wkv_float w, wkv_float k, wkv_float v, wkv_float& a, wkv_float& b, wkv_float& p) {
  return wkv4_join(w, v, wkv_float{} + 1.0f, k, a, b, p);
}

// y of this token: a weighted mean of the v's so far, the current one with the bonus u.
WKV_FN wkv_float wkv4_output(wkv_float u, wkv_float k, wkv_float v, wkv_float a, wkv_float b, wkv_float p) {
  const WkvPair e = wkv_pair(p, u + k);
  return wkv_divide(e.past * a + e.now * v, e.past * b + e.now);
}

// y's gradient as seen by the numerator and the denominator of the state before the token, and by the token.
struct WkvOutputGradient { WkvPair e; wkv_float num, den; };
WKV_FN WkvOutputGradient wkv4_output_gradient(wkv_float u, wkv_float k, wkv_float v, wkv_float a, wkv_float b, wkv_float p, wkv_float gy) {
  const WkvPair e = wkv_pair(p, u + k);
  const wkv_float scale = wkv_divide(wkv_float{} + 1.0f, e.past * b + e.now);
  const wkv_float y = (e.past * a + e.now * v) * scale;
  const wkv_float num = gy * scale;
  return {e, num, -(num * y)};
}

// One step of the backward pass. In: the state (a, b, p) before the token, the factors f that wkv4_update had there, gy = dL/dy, and
// (ga, gb) = dL/d(a, b) of the state after it. Out: gk, gv; gw and gu are added to; (ga, gb) become dL/d(a, b) of the state before
// the token. p is a scale and has no gradient.
WKV_FN void wkv4_backward(WkvPair f, wkv_float u, wkv_float k, wkv_float v, wkv_float a, wkv_float b, wkv_float p, wkv_float gy,
                          wkv_float& ga, wkv_float& gb, wkv_float& gw, wkv_float& gu, wkv_float& gk, wkv_float& gv) {
  const WkvOutputGradient g = wkv4_output_gradient(u, k, v, a, b, p, gy);
  const wkv_float bonus = g.e.now * (g.num * v + g.den);
  gw += f.past * (ga * a + gb * b);
  gu += bonus;
  gk = bonus + f.now * (ga * v + gb);
  gv = g.e.now * g.num + f.now * ga;
  ga = f.past * ga + g.e.past * g.num;
  gb = f.past * gb + g.e.past * g.den;
}

// ---- A stretch of tokens that needs no scale ----
// Where all keys are small numbers, the state is (a, b) itself, at e^0: a token takes one exponential, e = e^k, where the steps above take two and look
// for a maximum at each. Small: |k| + |u| <= WKV_SMALL for every k, and the incoming p no larger than WKV_SMALL. ew = e^w and eu = e^u, once for all tokens.

#define WKV_SMALL 60.0f  // e^60 times a number of any reasonable size lies inside fp32's range, and so does its inverse

// (a, b) at e^from becomes (a, b) at e^to.
WKV_FN void wkv4_rescale(wkv_float from, wkv_float to, wkv_float& a, wkv_float& b) {
  const wkv_float factor = wkv_exp(from - to);
  a *= factor;
  b *= factor;
}

WKV_FN void wkv4_small_update(wkv_float ew, wkv_float e, wkv_float v, wkv_float& a, wkv_float& b) {
  a = ew * a + e * v;
  b = ew * b + e;
}

WKV_FN wkv_float wkv4_small_output(wkv_float eu, wkv_float e, wkv_float v, wkv_float a, wkv_float b) {
  const wkv_float now = eu * e;
  return wkv_divide(a + now * v, b + now);
}

// As wkv4_backward. `w` and `u`, summed over the stretch and times ew and eu, are its shares of gw and gu.
WKV_FN void wkv4_small_backward(wkv_float ew, wkv_float eu, wkv_float e, wkv_float v, wkv_float a, wkv_float b, wkv_float gy, wkv_float& ga,
                                wkv_float& gb, wkv_float& w, wkv_float& u, wkv_float& gk, wkv_float& gv) {
  const wkv_float now = eu * e, scale = wkv_divide(wkv_float{} + 1.0f, b + now), num = gy * scale, den = num * ((a + now * v) * scale);
  const wkv_float through = eu * num + ga;  // of e·v, by y and by the state
  w += ga * a + gb * b;
  u += e * (num * v - den);
  gk = e * (through * v + (gb - eu * den));
  gv = e * through;
  ga = ew * ga + num;
  gb = ew * gb - den;
}
