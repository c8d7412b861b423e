// One step of Adam (Kingma & Ba 2015, arXiv:1412.6980) or AdamW (Loshchilov & Hutter 2019,
// arXiv:1711.05101) in one pass over parameters p, gradients g and moments m, v; see FusedAdam.
// Included by fused_cpu_loops.h.
//
// p₁ = decay_factor·p    g₁ = clip·g + l2·p₁    m' = m + (1 − β₁)(g₁ − m)    v' = β₂·v + (1 − β₂)·g₁²
// p' = p₁ − step_size·m' / (√v' / bias_correction2_sqrt + ε)
//
// If there is a copy, it becomes p' rounded to bf16, ties to even.

#ifdef __x86_64__
WKV_FN wkv_float wkv_sqrt(wkv_float x) { return (wkv_float)WKV_INTRINSIC(sqrt)((WKV_INTRINSIC_TYPE)x); }
#else
WKV_FN wkv_float wkv_sqrt(wkv_float x) {
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
#endif

// Rounds a block in fp32 order to bf16 as torch does: also denormals, which store() may flush to 0.
template <bool FULL>
WKV_FN void store_rounded(unsigned short* to, Block x, int64_t n) {
  x = canonical_nan(x);
  wkv_int even;
  for (int i = 0; i < LANES; i++) even[i] = 2 * i;
  const wkv_bits low = round_to_bf16(__builtin_shuffle(x.g[0], x.g[1], even)) >> 16;
  const wkv_bits high = round_to_bf16(__builtin_shuffle(x.g[0], x.g[1], even + 1)) & 0xffff0000u;
  write(to, low | high, FULL ? BLOCK : n);
}

void adam(const FusedAdam& q, int64_t begin, int64_t end) {
  using O = float;
  EACH_BLOCK(begin, end)
    Block p = GET(q.p + c), m = GET(q.m + c), v = GET(q.v + c);
    const Block g_ = GET(q.g + c);
    EACH_GROUP {
      p.g[g] *= q.decay_factor;
      const wkv_float g1 = g_.g[g] * q.clip + p.g[g] * q.l2;
      m.g[g] += (g1 - m.g[g]) * q.one_minus_beta1;
      v.g[g] = v.g[g] * q.beta2 + g1 * g1 * q.one_minus_beta2;
      p.g[g] -= m.g[g] * q.step_size / (wkv_sqrt(v.g[g]) / q.bias_correction2_sqrt + q.eps);
    }
    PUT(q.p + c, p);
    if (q.copy) store_rounded<decltype(full)::value>(q.copy + c, p, n);
    PUT(q.m + c, m);
    PUT(q.v + c, v);
  END_BLOCK
}
