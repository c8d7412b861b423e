// torch.ops.rwkv.adamw on a CPU. The compiler vectorises the loops over a block for each
// instruction set; as no product is fused into an FMA, all give the same bits. A block is copied to
// local arrays first, which cannot overlap, and padded with zeros.
#include <ATen/Parallel.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "optimizer/adamw_checks.h"

#pragma GCC optimize("fp-contract=off", "no-trapping-math")
#define WKV_FN static inline __attribute__((always_inline))
#ifdef __x86_64__
#define EVERY_WIDTH __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define EVERY_WIDTH
#endif
#define EACH for (int i = 0; i < B; i++)

namespace cpu {
namespace {

WKV_FN float multiply(float x, float y) { return x * y; }
WKV_FN unsigned as_bits(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
WKV_FN float as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }

#include "optimizer/adamw.h"

constexpr int B = ADAMW_BLOCK;
constexpr int64_t GRAIN = 64;  // blocks per task

WKV_FN float load(float x) { return x; }
WKV_FN float load(uint16_t x) { return as_float(unsigned(x) << 16); }
WKV_FN void store(float* to, float x, unsigned, unsigned) { *to = x; }
WKV_FN void store(uint16_t* to, float x, unsigned element, unsigned key) { *to = adamw_round(x, element, key); }

// sqrtf sets errno, which keeps the compiler from vectorising it.
WKV_FN void square_roots(const float* x, float* y) {
#ifdef __x86_64__
  for (int i = 0; i < B; i += 4) _mm_storeu_ps(y + i, _mm_sqrt_ps(_mm_loadu_ps(x + i)));
#else
  EACH y[i] = std::sqrt(x[i]);
#endif
}
WKV_FN float largest(const float* x) {  // magnitude
  constexpr int LANES = 16;
  float of_lane[LANES] = {}, y = 0;
  for (int first = 0; first < B; first += LANES)
    for (int i = 0; i < LANES; i++) {
      const float size = __builtin_fabsf(x[first + i]);
      of_lane[i] = size > of_lane[i] ? size : of_lane[i];
    }
  for (int i = 0; i < LANES; i++) y = of_lane[i] > y ? of_lane[i] : y;
  return y;
}
WKV_FN void codes_of(const float* x, float inverse, const float* bounds, int* codes) {
  float scaled[B];
  EACH scaled[i] = multiply(x[i], inverse);
  EACH codes[i] = 0;
  for (int half = 128; half; half /= 2) EACH codes[i] = adamw_search(scaled[i], bounds, codes[i], half);
}
template <class T> WKV_FN void copy(T* to, const void* from, int64_t n) { std::memcpy(to, from, n * sizeof(T)); }

// P: float, or uint16_t for bf16.
template <class P, bool QUANTISED> WKV_FN void run(const AdamW& args, int64_t begin, int64_t end) {  // blocks
  const AdamW q = args;
  const float clip = q.clip[0];
  float tables[4 * 256];
  if (QUANTISED) copy(tables, q.tables, 4 * 256);
  for (int64_t block = begin; block < end; block++) {
    const int64_t first = block * B, n = std::min<int64_t>(B, q.N - first);
    P p[B] = {}, g[B] = {};
    float m[B] = {}, v[B] = {}, roots[B];
    uint8_t m_codes[B] = {}, v_codes[B] = {};
    P* p_ = static_cast<P*>(q.p) + first;
    uint8_t *m8 = static_cast<uint8_t*>(q.m) + first, *v8 = static_cast<uint8_t*>(q.v) + first;
    float *m32 = static_cast<float*>(q.m) + first, *v32 = static_cast<float*>(q.v) + first;
    copy(p, p_, n);
    copy(g, static_cast<const P*>(q.g) + first, n);
    if (QUANTISED) {
      const float m_max = q.m_max[block], v_max = q.v_max[block];
      copy(m_codes, m8, n);
      copy(v_codes, v8, n);
      for (int i = 0; i < n; i++) m[i] = multiply(tables[m_codes[i]], m_max);
      for (int i = 0; i < n; i++) v[i] = multiply(tables[512 + v_codes[i]], v_max);
    } else {
      copy(m, m32, n);
      copy(v, v32, n);
    }
    EACH {
      const AdamWMoments moments = adamw_moments(q, load(g[i]), clip, m[i], v[i]);
      m[i] = moments.m, v[i] = moments.v;
    }
    square_roots(v, roots);
    EACH store(p + i, adamw_weight(q, load(p[i]), m[i], roots[i]), unsigned(first + i), q.key);
    copy(p_, p, n);
    if (!QUANTISED) {
      copy(m32, m, n);
      copy(v32, v, n);
      continue;
    }
    const float m_max = largest(m), v_max = largest(v);
    q.m_max[block] = m_max, q.v_max[block] = v_max;
    int codes[B];
    codes_of(m, adamw_inverse(m_max), tables + 256, codes);
    EACH m_codes[i] = uint8_t(codes[i]);
    codes_of(v, adamw_inverse(v_max), tables + 768, codes);
    EACH v_codes[i] = uint8_t(adamw_positive(codes[i], v[i]));
    copy(m8, m_codes, n);
    copy(v8, v_codes, n);
  }
}

EVERY_WIDTH void fp32_8bit(const AdamW& q, int64_t begin, int64_t end) { run<float, true>(q, begin, end); }
EVERY_WIDTH void fp32_full(const AdamW& q, int64_t begin, int64_t end) { run<float, false>(q, begin, end); }
EVERY_WIDTH void bf16_8bit(const AdamW& q, int64_t begin, int64_t end) { run<uint16_t, true>(q, begin, end); }
EVERY_WIDTH void bf16_full(const AdamW& q, int64_t begin, int64_t end) { run<uint16_t, false>(q, begin, end); }

}  // namespace

void adamw(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, const Optional<Tensor>& m_max,
           const Optional<Tensor>& v_max, const Tensor& tables, const Tensor& clip, int64_t step, double rate,
           double beta1, double beta2, double eps, double decay, int64_t key) {
  TORCH_CHECK(p.is_cpu(), "the weight must be on a CPU; it is on ", p.device());
  const AdamW q = optimizer::adamw_of(p, g, m, v, m_max, v_max, tables, clip, step, rate, beta1, beta2, eps, decay, key);
  if (q.clip[0] != q.clip[0]) return;
  const auto work = p.scalar_type() == at::kFloat ? (q.m_max ? fp32_8bit : fp32_full)
                                                  : (q.m_max ? bf16_8bit : bf16_full);
  at::parallel_for(0, (q.N + B - 1) / B, GRAIN, [&](int64_t begin, int64_t end) { work(q, begin, end); });
}

}  // namespace cpu
