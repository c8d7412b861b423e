// One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on one element, shared by all
// devices, with moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861) and bf16 weights.
//
// g₁ = clip·g    m' = m + (1 − β₁)(g₁ − m)    v' = β₂·v + (1 − β₂)·g₁²
// p' = round(decay_factor·p − step_size·m' / (√v' / bias_correction2_sqrt + ε))
//
// `round` is to bf16, up or down at random, so that it is exact on average: the bits that bf16
// lacks are added to 16 random bits. Those are a hash of the element's index and a key, so nothing
// is stored for them. Fp32 weights are not rounded.
//
// A moment in 8 bits is levels[code] · absmax of its block. Codes are rounded to the nearest level,
// of two the lower; but a positive v is never rounded to 0, because m / (√0 + ε) would be large.
// The step itself uses m' and v' in fp32.
//
// Every operation is rounded by itself, so all devices give the same bits, as long as no number is
// denormal (CPUs flush those in training). The including file defines WKV_FN, as_bits,
// and multiply(x, y), a product that is never fused into an FMA.

struct AdamWMoments { float m, v; };
WKV_FN AdamWMoments adamw_moments(const AdamW& q, float g, float clip, float m, float v) {
  const float g1 = multiply(g, clip);
  return {m + multiply(g1 - m, q.one_minus_beta1), multiply(v, q.beta2) + multiply(multiply(g1, g1), q.one_minus_beta2)};
}
WKV_FN float adamw_weight(const AdamW& q, float p, float m, float root) {  // root: √v'
  return multiply(p, q.decay_factor) - multiply(m, q.step_size) / (root / q.bias_correction2_sqrt + q.eps);
}

// MurmurHash3's finaliser (Appleby, public domain).
WKV_FN unsigned adamw_scramble(unsigned x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}
WKV_FN unsigned short adamw_round(float x, unsigned element, unsigned key) {
  const unsigned random = adamw_scramble(adamw_scramble(element) ^ key) >> 16;
  return x == x ? (as_bits(x) + random) >> 16 : 0x7fc0u;  // a sum beyond the largest number is infinity
}

// The factor that scales a block to [−1, 1].
WKV_FN float adamw_inverse(float absmax) { return 1.0f / (absmax > 1.17549435e-38f ? absmax : 1.17549435e-38f); }
// One step of a binary search. After those for half = 128, 64, ..., 1, starting from code 0, the
// code is the number of bounds, of 255 in ascending order, that x exceeds.
WKV_FN int adamw_search(float x, const float* bounds, int code, int half) {
  return x > bounds[code + half - 1] ? code + half : code;
}
WKV_FN int adamw_positive(int code, float v) { return code == 0 && v > 0 ? 1 : code; }
