// The CUDA unit: kernels over (batch row) x (segment of time) x (channel), a thread each, channels next to each other.
//
// Forward: wkv4_summary lets every segment run from an empty state, wkv4_scan joins these summaries to every segment's true
// incoming state, wkv4_output runs again from there and writes y and every 16th state. Backward: wkv4_summary_gradient,
// wkv4_scan_gradient and wkv4_gradient are the same three for gradients, which run against time. With one segment only the
// last of each three is launched. No thread's memory grows with T, nothing is added atomically.
//
// Compiled by NVRTC, as part of gpu.cu; tests compile it for the host as well.
#include "common/device.h"
#include "wkv4/wkv4_args.h"

namespace wkv {

#include "wkv4/wkv4.h"

struct State { float a, b, p; };
WKV_FN State empty_state() { return {0, 0, WKV_EMPTY}; }
WKV_FN State load_state(const float* at, long long C) { return {at[0], at[C], at[2 * C]}; }
WKV_FN State state_of(const float* states, const Wkv4Args& q, long long b, long long c) {  // a row of states [B, 3, C]; the empty state without them
  return states ? load_state(states + b * 3 * q.C + c, q.C) : empty_state();
}
WKV_FN void store_state(float* at, long long C, State s) { at[0] = s.a; at[C] = s.b; at[2 * C] = s.p; }

// The tokens of one segment of one row, in one channel.
struct Place { long long b, s, c, begin, end; };

WKV_FN bool find(const Wkv4Args& q, Place& at) {
  const long long i = thread_index();
  const long long row = i / q.C;
  at.c = i % q.C;
  at.s = row % q.segments;
  at.b = row / q.segments;
  at.begin = at.s * q.segment;
  at.end = at.s + 1 == q.segments ? q.T : at.begin + q.segment;
  return at.b < q.B;
}

WKV_FN float* kept(const Wkv4Args& q, long long b, long long t, long long c) {  // the state before token t, a multiple of WKV4_KEEP
  const long long states = (q.T + WKV4_KEEP - 1) / WKV4_KEEP;
  return q.kept + (b * states + t / WKV4_KEEP) * 3 * q.C + c;
}
WKV_FN float* carry(const Wkv4Args& q, long long b, long long s, long long c) { return q.carry + (b * q.segments + s) * 3 * q.C + c; }

// N tokens in registers, or the n that are left of the segment; bit i of `starts`: a document starts at token i.
// PLAIN: all N are there and no document starts, which is nearly always so.
struct Chunk {
  int n;
  unsigned starts;
  long long at;  // of the first token's element
};
#define EACH_TOKEN _Pragma("unroll") for (int i = 0; i < N; i++) if (PLAIN || i < chunk.n)
#define EACH_TOKEN_BACK _Pragma("unroll") for (int i = N - 1; i >= 0; i--) if (PLAIN || i < chunk.n)
#define STARTS (!PLAIN && (chunk.starts >> i & 1u))
#define FORWARD 8           // tokens at a time in the kernels that run with time: registers for two chunks
#define BACKWARD WKV4_KEEP  // and in the one that runs against it: from one kept state to the next

template <int N>
WKV_FN Chunk find_chunk(const Wkv4Args& q, const Place& at, long long t) {
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

// ---- forward ----

template <class E, bool PLAIN>
WKV_FN void advance(const Wkv4Args& q, const Place& at, const Chunk& chunk, float w, State& s) {
  constexpr int N = FORWARD;
  float k[N], v[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  EACH_TOKEN {
    if (STARTS) s = state_of(q.initial, q, at.b, at.c);
    wkv4_update(w, k[i], v[i], s.a, s.b, s.p);
  }
}
// kept[the next segment's start] = the state that this segment leaves if it starts empty; cut.
template <class E>
WKV_FN void summary(const Wkv4Args& q) {
  Place at;
  if (!find(q, at) || at.s + 1 == q.segments) return;
  const float w = q.w[at.c];
  State s = empty_state();
  unsigned starts = 0;
  for (long long t = at.begin; t < at.end; t += FORWARD) {
    const Chunk chunk = find_chunk<FORWARD>(q, at, t);
    starts |= chunk.starts;
    if (plain<FORWARD>(chunk)) advance<E, true>(q, at, chunk, w, s);
    else advance<E, false>(q, at, chunk, w, s);
  }
  store_state(kept(q, at.b, at.end, at.c), q.C, s);
  if (at.c == 0) q.cut[at.b * q.segments + at.s] = starts != 0;
}

#define TOGETHER 8  // segments whose summaries are read before the first is used

// kept[every segment's start] becomes the segment's incoming state.
WKV_FN void scan(const Wkv4Args& q) {
  const long long i = thread_index(), b = i / q.C, c = i % q.C;
  if (b >= q.B) return;
  const float decay = multiply(q.w[c], (float)q.segment);
  State run = state_of(q.first, q, b, c);
  store_state(kept(q, b, 0, c), q.C, run);
  for (long long s = 1; s < q.segments; s += TOGETHER) {
    State left[TOGETHER];
    bool cut[TOGETHER];
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
      if (s + j < q.segments) {
        left[j] = load_state(kept(q, b, (s + j) * q.segment, c), q.C);
        cut[j] = q.cut[b * q.segments + s + j - 1];
      }
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
      if (s + j < q.segments) {
        if (cut[j]) run = left[j];
        else wkv4_join(decay, left[j].a, left[j].b, left[j].p, run.a, run.b, run.p);
        store_state(kept(q, b, (s + j) * q.segment, c), q.C, run);
      }
  }
}

template <class E, bool PLAIN>
WKV_FN void write_outputs(const Wkv4Args& q, const Place& at, const Chunk& chunk, float w, float u, State& s) {
  constexpr int N = FORWARD;
  float k[N], v[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  E* y = (E*)q.y + chunk.at;
  EACH_TOKEN {
    if (STARTS) s = state_of(q.initial, q, at.b, at.c);
    store(y + i * q.C, wkv4_output(u, k[i], v[i], s.a, s.b, s.p));
    wkv4_update(w, k[i], v[i], s.a, s.b, s.p);
  }
}
template <class E>
WKV_FN void output(const Wkv4Args& q) {
  Place at;
  if (!find(q, at)) return;
  const float w = q.w[at.c], u = q.u[at.c];
  State s = q.segments > 1 ? load_state(kept(q, at.b, at.begin, at.c), q.C) : state_of(q.first, q, at.b, at.c);
  for (long long t = at.begin; t < at.end; t += FORWARD) {
    if (t % WKV4_KEEP == 0) store_state(kept(q, at.b, t, at.c), q.C, s);
    const Chunk chunk = find_chunk<FORWARD>(q, at, t);
    if (plain<FORWARD>(chunk)) write_outputs<E, true>(q, at, chunk, w, u, s);
    else write_outputs<E, false>(q, at, chunk, w, u, s);
  }
  if (at.end == q.T) store_state(q.last + at.b * 3 * q.C + at.c, q.C, s);
}

// ---- backward ----

// What a segment adds to dL/d(a, b) of its incoming state, and the factor by which dL/d(a, b) of its outgoing one arrives there.
struct Through { float ga, gb, factor; };

template <class E, bool PLAIN>
WKV_FN void pass_through(const Wkv4Args& q, const Place& at, const Chunk& chunk, float w, float u, State& s, Through& to) {
  constexpr int N = FORWARD;
  float k[N], v[N], gy[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  load_tokens<E, PLAIN, N>(q.gy, q, chunk, gy);
  EACH_TOKEN {
    if (STARTS) {
      s = state_of(q.initial, q, at.b, at.c);
      to.factor = 0;
    }
    const WkvOutputGradient g = wkv4_output_gradient(u, k[i], v[i], s.a, s.b, s.p, gy[i]);
    if (to.factor != 0) {  // not 0 times what may be infinite: a later document is not to be seen here
      to.ga += to.factor * g.e.past * g.num;
      to.gb += to.factor * g.e.past * g.den;
    }
    to.factor *= wkv4_update(w, k[i], v[i], s.a, s.b, s.p).past;
  }
}
template <class E>
WKV_FN void summary_gradient(const Wkv4Args& q) {
  Place at;
  if (!find(q, at)) return;
  const float w = q.w[at.c], u = q.u[at.c];
  State s = load_state(kept(q, at.b, at.begin, at.c), q.C);
  Through to = {0, 0, 1};
  for (long long t = at.begin; t < at.end && to.factor != 0; t += FORWARD) {
    const Chunk chunk = find_chunk<FORWARD>(q, at, t);
    if (plain<FORWARD>(chunk)) pass_through<E, true>(q, at, chunk, w, u, s, to);
    else pass_through<E, false>(q, at, chunk, w, u, s, to);
  }
  if (at.end < q.T && to.factor != 0) {  // the factor that wkv4_scan had: rounding lets the product over the tokens drift away from it
    const float past = kept(q, at.b, at.begin, at.c)[2 * q.C] + multiply(w, (float)q.segment);
    to.factor = wkv_pair(past, kept(q, at.b, at.end, at.c)[2 * q.C]).past;
  }
  float* p = carry(q, at.b, at.s, at.c);
  p[0] = to.ga;
  p[q.C] = to.gb;
  p[2 * q.C] = to.factor;
}

// carry[every segment][0, 1] becomes dL/d(a, b) of its outgoing state, at the scale of the next segment's incoming one; gfirst is that of the
// first segment's incoming state, free of the drift inside segments that wkv4_gradient corrects for where they end.
WKV_FN void scan_gradient(const Wkv4Args& q) {
  const long long i = thread_index(), b = i / q.C, c = i % q.C;
  if (b >= q.B) return;
  float ga = q.glast ? q.glast[b * 3 * q.C + c] : 0, gb = q.glast ? q.glast[(b * 3 + 1) * q.C + c] : 0;
  for (long long s = q.segments - 1; s >= 0; s -= TOGETHER) {
    Through to[TOGETHER] = {};
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
      if (s - j >= 0) {
        const float* p = carry(q, b, s - j, c);
        to[j] = {p[0], p[q.C], p[2 * q.C]};
      }
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
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
WKV_FN void write_gradients(const Wkv4Args& q, const Place& at, const Chunk& chunk, float w, float u, State s, const float* next, Sums& g) {
  constexpr int N = BACKWARD;
  float k[N], v[N], gy[N];
  State before[N];
  load_tokens<E, PLAIN, N>(q.k, q, chunk, k);
  load_tokens<E, PLAIN, N>(q.v, q, chunk, v);
  load_tokens<E, PLAIN, N>(q.gy, q, chunk, gy);
  EACH_TOKEN {
    if (STARTS) s = state_of(q.initial, q, at.b, at.c);
    before[i] = s;
    wkv4_update(w, k[i], v[i], s.a, s.b, s.p);
  }
  if (next) {
    // The gradient has arrived for a state of scale *next. This run ends with the same state at scale s.p, which rounding may let differ.
    const float drift = s.p - *next, factor = drift < 1 && drift > -1 ? wkv_exp(drift) : 1.0f;
    g.ga *= factor;
    g.gb *= factor;
  }
  E *gk = (E*)q.gk + chunk.at, *gv = (E*)q.gv + chunk.at;
  EACH_TOKEN_BACK {
    float to_k, to_v;
    wkv4_backward(wkv_pair(before[i].p + w, k[i]), u, k[i], v[i], before[i].a, before[i].b, before[i].p, gy[i], g.ga, g.gb, g.gw, g.gu, to_k, to_v);
    store(gk + i * q.C, to_k);
    store(gv + i * q.C, to_v);
    if (STARTS) {  // the state before this token is the initial one
      g.initial_a += g.ga;
      g.initial_b += g.gb;
      g.ga = g.gb = 0;
    }
  }
}
template <class E>
WKV_FN void gradient(const Wkv4Args& q) {
  Place at;
  if (!find(q, at)) return;
  const float w = q.w[at.c], u = q.u[at.c];
  Sums g = {};
  if (q.segments > 1) {
    const float* p = carry(q, at.b, at.s, at.c);
    g.ga = p[0];
    g.gb = p[q.C];
  } else if (q.glast) {
    g.ga = q.glast[at.b * 3 * q.C + at.c];
    g.gb = q.glast[(at.b * 3 + 1) * q.C + at.c];
  }
  const float* next = at.end < q.T ? kept(q, at.b, at.end, at.c) + 2 * q.C : nullptr;  // only the segment's last chunk meets it
  for (long long t = (at.end - 1) / BACKWARD * BACKWARD; t >= at.begin; t -= BACKWARD) {
    const Chunk chunk = find_chunk<BACKWARD>(q, at, t);
    const State s = load_state(kept(q, at.b, t, at.c), q.C);
    if (plain<BACKWARD>(chunk)) write_gradients<E, true>(q, at, chunk, w, u, s, next, g);
    else write_gradients<E, false>(q, at, chunk, w, u, s, next, g);
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
