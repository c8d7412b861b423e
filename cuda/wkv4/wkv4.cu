// WKV4 kernels: one thread per (batch row, time segment, channel), with channels contiguous.
//
// Forward: wkv4_summary runs every segment from an empty state, wkv4_scan combines these summaries
// into every segment's incoming state, and wkv4_output runs every segment again from that state,
// writes y and saves every 16th state. Backward: wkv4_summary_gradient, wkv4_scan_gradient and
// wkv4_gradient do the same for gradients, backward in time. With one segment only the last kernel
// of each three is launched. The memory of a thread does not depend on T, and there are no atomics.
//
// Compiled by NVRTC as part of gpu.cu; tests also compile it for the host.
#include "common/device.h"
#include "wkv4/wkv4_args.h"

namespace wkv {

#include "wkv4/wkv4.h"

struct State { float a, b, p; };
WKV_FN State empty_state() { return {0, 0, WKV_EMPTY}; }
WKV_FN State load_state(const float* at, long long C) { return {at[0], at[C], at[2 * C]}; }
// A row of states [B, 3, C]; the empty state if null.
WKV_FN State state_of(const float* states, const Wkv4Args& q, long long b, long long c) {
  return states ? load_state(states + b * 3 * q.C + c, q.C) : empty_state();
}
WKV_FN void store_state(float* at, long long C, State s) { at[0] = s.a; at[C] = s.b; at[2 * C] = s.p; }

// Log-decay and bonus of a channel, and e^w and e^u for the unscaled steps.
struct Rates { float w, u, ew, eu; };
WKV_FN Rates rates_of(const Wkv4Args& q, long long c) {
  const float w = q.w[c], u = q.u[c];
  return {w, u, precise_exp(w), precise_exp(u)};
}

// Tokens [begin, end) of segment s of batch row b, in channel c.
struct Span { long long b, s, c, begin, end; };

WKV_FN bool locate(const Wkv4Args& q, Span& at) {
  const long long i = thread_index();
  const long long row = i / q.C;
  at.c = i % q.C;
  at.s = row % q.segments;
  at.b = row / q.segments;
  at.begin = at.s * q.segment;
  at.end = at.s + 1 == q.segments ? q.T : at.begin + q.segment;
  return at.b < q.B;
}

// The state before token t, a multiple of WKV4_SAVE_INTERVAL.
WKV_FN float* saved(const Wkv4Args& q, long long b, long long t, long long c) {
  const long long states = (q.T + WKV4_SAVE_INTERVAL - 1) / WKV4_SAVE_INTERVAL;
  return q.saved + (b * states + t / WKV4_SAVE_INTERVAL) * 3 * q.C + c;
}
WKV_FN float* carry(const Wkv4Args& q, long long b, long long s, long long c) {
  return q.carry + (b * q.segments + s) * 3 * q.C + c;
}

// N tokens in registers, or the n left in the segment; bit i of `starts`: a document starts at
// token i. PLAIN: n = N and no document starts, the common case.
struct Chunk {
  int n;
  unsigned starts;
  long long at;  // of the first token
};
#define EACH_TOKEN _Pragma("unroll") for (int i = 0; i < N; i++) if (PLAIN || i < chunk.n)
#define EACH_TOKEN_BACK _Pragma("unroll") for (int i = N - 1; i >= 0; i--) if (PLAIN || i < chunk.n)
#define STARTS (!PLAIN && (chunk.starts >> i & 1u))
#define FORWARD 8  // tokens per chunk, forward in time: registers for two chunks
#define BACKWARD WKV4_SAVE_INTERVAL  // tokens per chunk, backward: from one saved state to the next

template <int N>
WKV_FN Chunk find_chunk(const Wkv4Args& q, const Span& at, long long t) {
  const long long left = at.end - t;
  Chunk chunk = {left < N ? (int)left : N, 0, (at.b * q.T + t) * q.C + at.c};
  if (q.reset)
    for (int i = 0; i < chunk.n; i++) chunk.starts |= (q.reset[at.b * q.T + t + i] != 0 ? 1u : 0u) << i;
  return chunk;
}
template <int N> WKV_FN bool plain(const Chunk& chunk) { return chunk.n == N && !chunk.starts; }

template <class E, bool PLAIN, int N>
WKV_FN void load_tokens(const void* from, const Wkv4Args& q, const Chunk& chunk, float (&x)[N]) {
  const E* p = (const E*)from + chunk.at;
  EACH_TOKEN x[i] = load(p + i * q.C);
}

// Whether a PLAIN chunk with these keys can use the unscaled steps (wkv4.h), from a state of maximum p.
// A NaN in k does not count: it makes the same elements NaN in either case.
template <int N>
WKV_FN bool can_skip_scaling(const float (&k)[N], float u, float p) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < N; i++) largest = wkv_max(largest, -wkv_negative_magnitude(k[i]));
  return largest - wkv_negative_magnitude(u) <= WKV_UNSCALED_MAX &&
         (wkv_negative_magnitude(p) >= -WKV_UNSCALED_MAX || p == WKV_EMPTY);
}

// ---- forward ----

template <class E, bool PLAIN>
WKV_FN void advance(const Wkv4Args& q, const Span& at, const Chunk& chunk, Rates r, State& s) {
  constexpr int N = FORWARD;
  float k[N], v[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  if (PLAIN && can_skip_scaling(k, 0, s.p)) {
    wkv4_rescale(s.p, 0, s.a, s.b);
    EACH_TOKEN {
      wkv4_unscaled_update(r.ew, wkv_exp(k[i]), v[i], s.a, s.b);
      s.p = wkv_max(s.p + r.w, k[i]);
    }
    wkv4_rescale(0, s.p, s.a, s.b);
    return;
  }
  EACH_TOKEN {
    if (STARTS) s = state_of(q.initial, q, at.b, at.c);
    wkv4_update(r.w, k[i], v[i], s.a, s.b, s.p);
  }
}
// saved[next segment's start] = the state after this segment, run from the empty state. Sets
// has_reset.
template <class E>
WKV_FN void summary(const Wkv4Args& q) {
  Span at;
  if (!locate(q, at) || at.s + 1 == q.segments) return;
  const Rates r = rates_of(q, at.c);
  State s = empty_state();
  unsigned starts = 0;
  for (long long t = at.begin; t < at.end; t += FORWARD) {
    const Chunk chunk = find_chunk<FORWARD>(q, at, t);
    starts |= chunk.starts;
    if (plain<FORWARD>(chunk)) advance<E, true>(q, at, chunk, r, s);
    else advance<E, false>(q, at, chunk, r, s);
  }
  store_state(saved(q, at.b, at.end, at.c), q.C, s);
  if (at.c == 0) q.has_reset[at.b * q.segments + at.s] = starts != 0;
}

#define SCAN_UNROLL 8  // segment summaries loaded at once

// Replaces saved[every segment's start] by the segment's incoming state.
WKV_FN void scan(const Wkv4Args& q) {
  const long long i = thread_index(), b = i / q.C, c = i % q.C;
  if (b >= q.B) return;
  const float decay = multiply(q.w[c], (float)q.segment);
  State run = state_of(q.first, q, b, c);
  store_state(saved(q, b, 0, c), q.C, run);
  for (long long s = 1; s < q.segments; s += SCAN_UNROLL) {
    State summary_of[SCAN_UNROLL];
    bool has_reset[SCAN_UNROLL];
#pragma unroll
    for (int j = 0; j < SCAN_UNROLL; j++)
      if (s + j < q.segments) {
        summary_of[j] = load_state(saved(q, b, (s + j) * q.segment, c), q.C);
        has_reset[j] = q.has_reset[b * q.segments + s + j - 1];
      }
#pragma unroll
    for (int j = 0; j < SCAN_UNROLL; j++)
      if (s + j < q.segments) {
        if (has_reset[j]) run = summary_of[j];
        else wkv4_combine(decay, summary_of[j].a, summary_of[j].b, summary_of[j].p, run.a, run.b, run.p);
        store_state(saved(q, b, (s + j) * q.segment, c), q.C, run);
      }
  }
}

template <class E, bool PLAIN>
WKV_FN void write_outputs(const Wkv4Args& q, const Span& at, const Chunk& chunk, Rates r, State& s) {
  constexpr int N = FORWARD;
  float k[N], v[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  E* y = (E*)q.y + chunk.at;
  if (PLAIN && can_skip_scaling(k, r.u, s.p)) {
    wkv4_rescale(s.p, 0, s.a, s.b);
    EACH_TOKEN {
      const float e = wkv_exp(k[i]);
      store(y + i * q.C, wkv4_unscaled_output(r.eu, e, v[i], s.a, s.b));
      wkv4_unscaled_update(r.ew, e, v[i], s.a, s.b);
      s.p = wkv_max(s.p + r.w, k[i]);
    }
    wkv4_rescale(0, s.p, s.a, s.b);
    return;
  }
  EACH_TOKEN {
    if (STARTS) s = state_of(q.initial, q, at.b, at.c);
    store(y + i * q.C, wkv4_output(r.u, k[i], v[i], s.a, s.b, s.p));
    wkv4_update(r.w, k[i], v[i], s.a, s.b, s.p);
  }
}
template <class E>
WKV_FN void output(const Wkv4Args& q) {
  Span at;
  if (!locate(q, at)) return;
  const Rates r = rates_of(q, at.c);
  State s = q.segments > 1 ? load_state(saved(q, at.b, at.begin, at.c), q.C) : state_of(q.first, q, at.b, at.c);
  for (long long t = at.begin; t < at.end; t += FORWARD) {
    if (t % WKV4_SAVE_INTERVAL == 0) store_state(saved(q, at.b, t, at.c), q.C, s);
    const Chunk chunk = find_chunk<FORWARD>(q, at, t);
    if (plain<FORWARD>(chunk)) write_outputs<E, true>(q, at, chunk, r, s);
    else write_outputs<E, false>(q, at, chunk, r, s);
  }
  if (at.end == q.T) store_state(q.last + at.b * 3 * q.C + at.c, q.C, s);
}

// ---- backward ----

// The gradient of a segment's incoming (a, b) is affine in that of its outgoing (a, b):
// (ga, gb) + factor · gradient.
struct AffineGradient { float ga, gb, factor; };

template <class E, bool PLAIN>
WKV_FN void accumulate_affine(const Wkv4Args& q, const Span& at, const Chunk& chunk, Rates r, State& s,
                              AffineGradient& to) {
  constexpr int N = FORWARD;
  float k[N], v[N], gy[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  load_tokens<E, PLAIN, N>(q.gy, q, chunk, gy);
  if (PLAIN && can_skip_scaling(k, r.u, s.p)) {
    wkv4_rescale(s.p, 0, s.a, s.b);
    to.factor *= wkv_exp(s.p);
    EACH_TOKEN {
      const float e = wkv_exp(k[i]);
      float num, den;
      wkv4_unscaled_output_gradient(r.eu, e, v[i], s.a, s.b, gy[i], num, den);
      to.ga += to.factor * num;
      to.gb -= to.factor * den;
      to.factor *= r.ew;
      wkv4_unscaled_update(r.ew, e, v[i], s.a, s.b);
      s.p = wkv_max(s.p + r.w, k[i]);
    }
    wkv4_rescale(0, s.p, s.a, s.b);
    to.factor *= wkv_exp(-s.p);
    return;
  }
  EACH_TOKEN {
    if (STARTS) {
      s = state_of(q.initial, q, at.b, at.c);
      to.factor = 0;
    }
    const WkvOutputGradient g = wkv4_output_gradient(r.u, k[i], v[i], s.a, s.b, s.p, gy[i]);
    if (to.factor != 0) {  // 0 · Inf: a later document must not leak into this one
      to.ga += to.factor * g.e.past * g.num;
      to.gb += to.factor * g.e.past * g.den;
    }
    to.factor *= wkv4_update(r.w, k[i], v[i], s.a, s.b, s.p).past;
  }
}
template <class E>
WKV_FN void summary_gradient(const Wkv4Args& q) {
  Span at;
  if (!locate(q, at)) return;
  const Rates r = rates_of(q, at.c);
  State s = load_state(saved(q, at.b, at.begin, at.c), q.C);
  AffineGradient to = {0, 0, 1};
  for (long long t = at.begin; t < at.end && to.factor != 0; t += FORWARD) {
    const Chunk chunk = find_chunk<FORWARD>(q, at, t);
    if (plain<FORWARD>(chunk)) accumulate_affine<E, true>(q, at, chunk, r, s, to);
    else accumulate_affine<E, false>(q, at, chunk, r, s, to);
  }
  // Use the factor of wkv4_scan: rounding makes the product over the tokens drift from it.
  if (at.end < q.T && to.factor != 0) {
    const float past = saved(q, at.b, at.begin, at.c)[2 * q.C] + multiply(r.w, (float)q.segment);
    to.factor = wkv_pair(past, saved(q, at.b, at.end, at.c)[2 * q.C]).past;
  }
  float* p = carry(q, at.b, at.s, at.c);
  p[0] = to.ga;
  p[q.C] = to.gb;
  p[2 * q.C] = to.factor;
}

// carry[every segment][0, 1] = dL/d(a, b) of its outgoing state, at the scale of the next segment's
// incoming state. gfirst is the gradient of the first incoming state, without the rounding drift
// within segments that wkv4_gradient corrects.
WKV_FN void scan_gradient(const Wkv4Args& q) {
  const long long i = thread_index(), b = i / q.C, c = i % q.C;
  if (b >= q.B) return;
  float ga = q.glast ? q.glast[b * 3 * q.C + c] : 0, gb = q.glast ? q.glast[(b * 3 + 1) * q.C + c] : 0;
  for (long long s = q.segments - 1; s >= 0; s -= SCAN_UNROLL) {
    AffineGradient to[SCAN_UNROLL] = {};
#pragma unroll
    for (int j = 0; j < SCAN_UNROLL; j++)
      if (s - j >= 0) {
        const float* p = carry(q, b, s - j, c);
        to[j] = {p[0], p[q.C], p[2 * q.C]};
      }
#pragma unroll
    for (int j = 0; j < SCAN_UNROLL; j++)
      if (s - j >= 0) {
        float* p = carry(q, b, s - j, c);
        p[0] = ga;
        p[q.C] = gb;
        ga = to[j].factor != 0 ? to[j].factor * ga + to[j].ga : to[j].ga;
        gb = to[j].factor != 0 ? to[j].factor * gb + to[j].gb : to[j].gb;
      }
  }
  store_state(q.gfirst + b * 3 * q.C + c, q.C, {ga, gb, 0});
}

struct Sums { float ga, gb, gw, gu, initial_a, initial_b; };

template <class E, bool PLAIN>
WKV_FN void write_gradients(const Wkv4Args& q, const Span& at, const Chunk& chunk, Rates r, State s,
                            const float* next, Sums& g) {
  constexpr int N = BACKWARD;
  float k[N], v[N], gy[N];
  State before[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  load_tokens<E, PLAIN, N>(q.gy, q, chunk, gy);
  E *gk = (E*)q.gk + chunk.at, *gv = (E*)q.gv + chunk.at;
  if (PLAIN && can_skip_scaling(k, r.u, s.p)) {
    const float start = s.p;
    float sum_w = 0, sum_u = 0;
    wkv4_rescale(start, 0, s.a, s.b);
    EACH_TOKEN {
      s.p = wkv_max(s.p + r.w, k[i]);
      k[i] = wkv_exp(k[i]);
      before[i].a = s.a, before[i].b = s.b;
      wkv4_unscaled_update(r.ew, k[i], v[i], s.a, s.b);
    }
    wkv4_rescale(0, next ? *next : s.p, g.ga, g.gb);  // gradients scale inversely
    EACH_TOKEN_BACK {
      float to_k, to_v;
      wkv4_unscaled_backward(r.ew, r.eu, k[i], v[i], before[i].a, before[i].b, gy[i], g.ga, g.gb, sum_w, sum_u, to_k,
                             to_v);
      store(gk + i * q.C, to_k);
      store(gv + i * q.C, to_v);
    }
    g.gw += r.ew * sum_w;
    g.gu += r.eu * sum_u;
    wkv4_rescale(start, 0, g.ga, g.gb);
    return;
  }
  EACH_TOKEN {
    if (STARTS) s = state_of(q.initial, q, at.b, at.c);
    before[i] = s;
    wkv4_update(r.w, k[i], v[i], s.a, s.b, s.p);
  }
  if (next) {
    // The gradient refers to a state of scale *next; this run reaches that state with scale s.p,
    // which may differ by rounding.
    const float drift = s.p - *next, factor = drift < 1 && drift > -1 ? wkv_exp(drift) : 1.0f;
    g.ga *= factor;
    g.gb *= factor;
  }
  EACH_TOKEN_BACK {
    float to_k, to_v;
    wkv4_backward(wkv_pair(before[i].p + r.w, k[i]), r.u, k[i], v[i], before[i].a, before[i].b, before[i].p, gy[i], g.ga,
                  g.gb, g.gw, g.gu, to_k, to_v);
    store(gk + i * q.C, to_k);
    store(gv + i * q.C, to_v);
    if (STARTS) {  // this token started from the initial state
      g.initial_a += g.ga;
      g.initial_b += g.gb;
      g.ga = g.gb = 0;
    }
  }
}
template <class E>
WKV_FN void gradient(const Wkv4Args& q) {
  Span at;
  if (!locate(q, at)) return;
  const Rates r = rates_of(q, at.c);
  Sums g = {};
  if (q.segments > 1) {
    const float* p = carry(q, at.b, at.s, at.c);
    g.ga = p[0];
    g.gb = p[q.C];
  } else if (q.glast) {
    g.ga = q.glast[at.b * 3 * q.C + at.c];
    g.gb = q.glast[(at.b * 3 + 1) * q.C + at.c];
  }
  // for the segment's last chunk only
  const float* next = at.end < q.T ? saved(q, at.b, at.end, at.c) + 2 * q.C : nullptr;
  for (long long t = (at.end - 1) / BACKWARD * BACKWARD; t >= at.begin; t -= BACKWARD) {
    const Chunk chunk = find_chunk<BACKWARD>(q, at, t);
    const State s = load_state(saved(q, at.b, t, at.c), q.C);
    if (plain<BACKWARD>(chunk)) write_gradients<E, true>(q, at, chunk, r, s, next, g);
    else write_gradients<E, false>(q, at, chunk, r, s, next, g);
    next = nullptr;
  }
  const long long row = at.b * q.segments + at.s;
  q.gw[row * q.C + at.c] = g.gw;
  q.gu[row * q.C + at.c] = g.gu;
  if (q.ginitial) store_state(q.ginitial + row * 3 * q.C + at.c, q.C, {g.initial_a, g.initial_b, 0});
  if (q.segments == 1) store_state(q.gfirst + row * 3 * q.C + at.c, q.C, {g.ga, g.gb, 0});
}

#define KERNELS_OF(E)                                                                               \
  KERNEL(WKV4_THREADS) wkv4_summary_##E(const Wkv4Args q) { summary<E>(q); }                         \
  KERNEL(WKV4_THREADS) wkv4_output_##E(const Wkv4Args q) { output<E>(q); }                           \
  KERNEL(WKV4_THREADS) wkv4_summary_gradient_##E(const Wkv4Args q) { summary_gradient<E>(q); }       \
  KERNEL(WKV4_THREADS) wkv4_gradient_##E(const Wkv4Args q) { gradient<E>(q); }
KERNELS_OF(fp32)
KERNELS_OF(bf16)
KERNELS_OF(fp16)
KERNEL(WKV4_THREADS) wkv4_scan(const Wkv4Args q) { scan(q); }
KERNEL(WKV4_THREADS) wkv4_scan_gradient(const Wkv4Args q) { scan_gradient(q); }
#undef KERNELS_OF

}  // namespace wkv
