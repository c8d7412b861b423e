// The CUDA kernels of AdamW; adamw.cpp has the CPU loops. A warp processes blocks of 256 elements,
// ADAMW_WIDTH neighbouring ones per thread, and shares their absmax by shuffles. The tables of
// levels are in shared memory, loaded once for all blocks of a thread block.
#include "common/device.h"
#include "elementwise/vectors.h"
#include "optimizer/adamw_args.h"

namespace optimizer {

using fused::Vec8;

#include "optimizer/adamw.h"

struct Codes { unsigned char x[ADAMW_WIDTH]; };
struct alignas(8) Words2 { unsigned w[2]; };

template <class E> WKV_FN Vec8 get(const AdamW& q, const void* from, long long at) {
  if (q.vectorized && at + ADAMW_WIDTH <= q.N) return fused::load_vec8((const E*)from + at);
  Vec8 x = {};
  for (int i = 0; i < ADAMW_WIDTH && at + i < q.N; i++) x.x[i] = load((const E*)from + at + i);
  return x;
}
WKV_FN void put(const AdamW& q, fp32* to, long long at, const Vec8& x) {
  if (q.vectorized && at + ADAMW_WIDTH <= q.N) return fused::store_vec8(to + at, x);
  for (int i = 0; i < ADAMW_WIDTH && at + i < q.N; i++) store(to + at + i, x.x[i]);
}
WKV_FN Codes get_codes(const AdamW& q, const void* from, long long at) {
  Codes y = {};
  const unsigned char* codes = (const unsigned char*)from + at;
  if (q.vectorized && at + ADAMW_WIDTH <= q.N) {
    const Words2 words = *(const Words2*)codes;
#pragma unroll
    for (int i = 0; i < ADAMW_WIDTH; i++) y.x[i] = words.w[i / 4] >> i % 4 * 8;
    return y;
  }
  for (int i = 0; i < ADAMW_WIDTH && at + i < q.N; i++) y.x[i] = codes[i];
  return y;
}
WKV_FN void put_codes(const AdamW& q, void* to, long long at, const Codes& y) {
  unsigned char* codes = (unsigned char*)to + at;
  if (q.vectorized && at + ADAMW_WIDTH <= q.N) {
    Words2 words = {};
#pragma unroll
    for (int i = 0; i < ADAMW_WIDTH; i++) words.w[i / 4] |= (unsigned)y.x[i] << i % 4 * 8;
    *(Words2*)codes = words;
    return;
  }
  for (int i = 0; i < ADAMW_WIDTH && at + i < q.N; i++) codes[i] = y.x[i];
}
WKV_FN int code_of(float x, const float* bounds) {
  int code = 0;
#pragma unroll
  for (int half = 128; half; half /= 2) code = adamw_search(x, bounds, code, half);
  return code;
}
WKV_FN float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = wkv_max(x, shuffle_xor(x, mask));
  return x;
}

// The new weights, of fp32 in fp32, of bf16 as their bits.
WKV_FN void put_weights(const AdamW& q, fp32* p, long long at, const Vec8& x) { put(q, p, at, x); }
WKV_FN void put_weights(const AdamW& q, bf16* p, long long at, const Vec8& x) {
  unsigned short bits[ADAMW_WIDTH];
#pragma unroll
  for (int i = 0; i < ADAMW_WIDTH; i++) bits[i] = adamw_round(x.x[i], (unsigned)(at + i), q.key);
  if (q.vectorized && at + ADAMW_WIDTH <= q.N) {
    fused::Words4 words;
#pragma unroll
    for (int i = 0; i < 4; i++) words.w[i] = bits[2 * i] | (unsigned)bits[2 * i + 1] << 16;
    return fused::store_words(p + at, words);
  }
  for (int i = 0; i < ADAMW_WIDTH && at + i < q.N; i++) p[at + i].bits = bits[i];
}

// Updates p from the moments, which become those of this step.
template <class E> WKV_FN void update(const AdamW& q, long long at, float clip, Vec8& m, Vec8& v) {
  const Vec8 g = get<E>(q, q.g, at);
  Vec8 p = get<E>(q, q.p, at);
#pragma unroll
  for (int i = 0; i < ADAMW_WIDTH; i++) {
    const AdamWMoments moments = adamw_moments(q, g.x[i], clip, m.x[i], v.x[i]);
    m.x[i] = moments.m, v.x[i] = moments.v;
    p.x[i] = adamw_weight(q, p.x[i], m.x[i], square_root(v.x[i]));
  }
  put_weights(q, (E*)q.p, at, p);
}

template <class E> WKV_FN void quantised(const AdamW& q) {
  SHARED float tables[4][256];
  for (int i = thread_number(); i < 4 * 256; i += ADAMW_THREADS) tables[i / 256][i % 256] = q.tables[i];
  barrier();
  const float clip = q.clip[0];
  if (clip != clip) return;
  const long long blocks = (q.N + ADAMW_BLOCK - 1) / ADAMW_BLOCK;
  const int lane = thread_number() % 32;
  long long block = (long long)block_number() * ADAMW_WARPS * q.runs + thread_number() / 32;
  for (int run = 0; run < q.runs; run++, block += ADAMW_WARPS) {
    const bool active = block < blocks;  // the others take part in shuffles
    const long long at = block * ADAMW_BLOCK + lane * ADAMW_WIDTH;
    Vec8 m = {}, v = {};
    float m_max = 0, v_max = 0;
    if (active && at < q.N) {
      const Codes m_codes = get_codes(q, q.m, at), v_codes = get_codes(q, q.v, at);
      m_max = q.m_max[block], v_max = q.v_max[block];
#pragma unroll
      for (int i = 0; i < ADAMW_WIDTH; i++) {
        m.x[i] = multiply(tables[0][m_codes.x[i]], m_max);
        v.x[i] = multiply(tables[2][v_codes.x[i]], v_max);
        if (at + i >= q.N) m.x[i] = v.x[i] = 0;
      }
      update<E>(q, at, clip, m, v);
    }
    m_max = v_max = 0;
#pragma unroll
    for (int i = 0; i < ADAMW_WIDTH; i++) {
      m_max = wkv_max(m_max, -wkv_negative_magnitude(m.x[i]));
      v_max = wkv_max(v_max, v.x[i]);
    }
    m_max = warp_max(m_max), v_max = warp_max(v_max);
    if (!active || at >= q.N) continue;
    if (lane == 0) q.m_max[block] = m_max, q.v_max[block] = v_max;
    const float m_inverse = adamw_inverse(m_max), v_inverse = adamw_inverse(v_max);
    Codes m_codes, v_codes;
#pragma unroll
    for (int i = 0; i < ADAMW_WIDTH; i++) {
      m_codes.x[i] = code_of(multiply(m.x[i], m_inverse), tables[1]);
      v_codes.x[i] = adamw_positive(code_of(multiply(v.x[i], v_inverse), tables[3]), v.x[i]);
    }
    put_codes(q, q.m, at, m_codes);
    put_codes(q, q.v, at, v_codes);
  }
}

template <class E> WKV_FN void full(const AdamW& q) {
  const long long at = thread_index() * ADAMW_WIDTH;
  const float clip = q.clip[0];
  if (at >= q.N || clip != clip) return;
  Vec8 m = get<fp32>(q, q.m, at), v = get<fp32>(q, q.v, at);
  update<E>(q, at, clip, m, v);
  put(q, (fp32*)q.m, at, m);
  put(q, (fp32*)q.v, at, v);
}

#define OF(E)                                                               \
  KERNEL(ADAMW_THREADS) adamw_8bit_##E(const AdamW q) { quantised<E>(q); }  \
  KERNEL(ADAMW_THREADS) adamw_full_##E(const AdamW q) { full<E>(q); }
OF(fp32)
OF(bf16)
#undef OF

}  // namespace optimizer
