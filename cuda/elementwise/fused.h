// The elementwise formulas of a block and of the loss, with their gradients, for one element; shared
// by all devices.
//
// mix       m·x + (1 − m)·before        before: the previous token, or the initial one at a document start
// gate      σ(r)·v
// relu2     max(k, 0)²
// norm      w·(x − mean)/σ + b          LayerNorm over D channels, fp32 statistics
// dropout   x / (1 − p) or 0            decided by a hash of element index and seed: no mask is saved
//
// The including file defines WKV_FN, wkv_float, wkv_exp, wkv_negative_magnitude and wkv_divide, as
// for wkv4.h, and wkv_bits: unsigned 32-bit integers in the layout of wkv_float.

WKV_FN wkv_float fused_mix(wkv_float before, wkv_float x, wkv_float m) { return before + m * (x - before); }

struct FusedSigmoid { wkv_float on, off; };  // σ(x) and 1 − σ(x) = σ(−x), without cancellation
WKV_FN FusedSigmoid fused_sigmoid(wkv_float x) {
  const wkv_float e = wkv_exp(wkv_negative_magnitude(x)), one = wkv_float{} + 1.0f, larger = wkv_divide(one, one + e),
                  smaller = e * larger;
  return {x >= 0 ? larger : smaller, x >= 0 ? smaller : larger};
}

WKV_FN wkv_float fused_gate(wkv_float r, wkv_float v) { return fused_sigmoid(r).on * v; }

// g: gradient of σ(r)·v.
WKV_FN void fused_gate_gradient(wkv_float g, wkv_float r, wkv_float v, wkv_float& gr, wkv_float& gv) {
  const FusedSigmoid s = fused_sigmoid(r);
  gv = g * s.on;
  gr = gv * v * s.off;
}

WKV_FN wkv_float fused_relu2(wkv_float k) { return k > 0 ? k * k : k * 0; }
WKV_FN wkv_float fused_relu2_gradient(wkv_float g, wkv_float k) { return k > 0 ? 2.0f * k * g : k * 0; }

// Gradient of LayerNorm's input. `sum` and `product` are the means of g·w and g·w·normal over the
// channels.
WKV_FN wkv_float fused_norm_gradient(wkv_float g, wkv_float w, wkv_float normal, wkv_float scale, wkv_float sum,
                                     wkv_float product) {
  return scale * (g * w - sum - normal * product);
}

// MurmurHash3's finaliser (Appleby, public domain), a bijection on 32-bit integers.
template <class Bits> WKV_FN Bits fused_scramble(Bits x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}
// Uniform 32-bit hash; an element is dropped if it is below p · 2³².
WKV_FN wkv_bits fused_hash(wkv_bits element, unsigned seed) { return fused_scramble(fused_scramble(element) ^ seed); }
