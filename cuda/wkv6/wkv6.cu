// WKV6 kernels: the recurrence, token by token, with the state in registers.
//
// The keys of a state (its rows) do not interact: a warp has 2 * KEYS keys and all values, a thread
// KEYS keys and, of each group of 64 values, 4 adjacent ones. Sums over values (gradients of r, k and
// w) are shuffles. Sums over keys (y and the gradient of v) pass through shared memory; as no later
// token depends on them, several tokens are summed at once. Tokens are staged in shared memory, with
// e^w for w; the next ones are loaded meanwhile. Tokens after the last, and keys and values beyond N,
// are zeros and change nothing.
//
// Backward, WKV6_SAVE_INTERVAL tokens at a time: the first pass goes from the saved state through all
// of them and puts every STATES-th state into `work`; then, from the last to the first, STATES states
// are recomputed in registers. No step divides by a decay. No atomics: results are bit-identical.
//
// A sequence may be split into segments, a block each. Then wkv6_summary and wkv6_scan run first, which compute the
// state before each segment, or the gradient of the state after it (cuda/README.md).
//
// Compiled by NVRTC as part of gpu.cu; tests also compile it for the host.
#include "wkv6/wkv6_tile.h"

namespace wkv6 {

// The state after a token from the state before it.
template <class S, class T> WKV_FN void update(State<S>& to, const State<S>& x, const T& at, int i_token, const Place& p) {
  Keys<S> w, k;
  Values<S> v;
  keys<S>(w, at.x[W][i_token], p);
  keys<S>(k, at.x[K][i_token], p);
  values<S>(v, at.x[V][i_token], p);
  EACH_KEY EACH_VALUE to[i][j] = x[i][j] * w[i] + k[i] * v[j];
}

// ---- forward ----

template <class S> WKV_FN void output(const Wkv6Args& q) {
  SHARED Tokens<S, R + 1> tokens;
  SHARED Partial<S> partial;
  const Place p = place<S>(q);
  State<S> x;
  Keys<S> u;
  EACH_KEY u[i] = p.key + i < q.N ? q.u[p.head * q.N + p.key + i] : 0;
  read_state<S>(x, segment_state(q.first, q, p), q, p);
  Fetched<S, R + 1> next = fetch<S, R + 1>(q, p, p.begin);
  for (long long begin = p.begin; begin < p.end; begin += S::STAGE) {
    if (begin % WKV6_SAVE_INTERVAL == 0) write_state<S>(saved(q, p, begin / WKV6_SAVE_INTERVAL), x, q, p);
    barrier();
    put<S, R + 1>(tokens, next, p);
    barrier();
    next = fetch<S, R + 1>(q, p, begin + S::STAGE);
    NO_UNROLL for (int base = 0; base < S::STAGE; base += S::FLUSH) {
      _Pragma("unroll 2") for (int n = 0; n < S::FLUSH; n++) {
        const int i_token = base + n;
        if (tokens.starts[i_token]) read_state<S>(x, state_of(q.initial, q, p), q, p);
        Keys<S> r, k;
        Values<S> v, sum;
        keys<S>(r, tokens.x[R][i_token], p);
        keys<S>(k, tokens.x[K][i_token], p);
        values<S>(v, tokens.x[V][i_token], p);
        float bonus = 0;
        EACH_KEY bonus += r[i] * u[i] * k[i];
        EACH_VALUE {
          sum[j] = bonus * v[j];
          EACH_KEY sum[j] += r[i] * x[i][j];
        }
        put_partial<S>(partial[n][p.warp], sum, p);
        update<S>(x, x, tokens, i_token, p);
      }
      flush<S>(q.y, partial, q, p, begin + base);
    }
  }
  if (p.end == q.T) write_state<S>(state_of(q.last, q, p), x, q, p);
}

// ---- backward ----

template <class S> struct GradientMemory {
  Tokens<S, GY + 1> tokens;  // the backward pass replaces r, w and k of this block's keys by their gradients
  Partial<S> partial;
};

// A thread's part of a state of `work`, which no other thread reads.
template <class S> WKV_FN Four<float>* work(const Wkv6Args& q, const Place& p, int slot) {
  return (Four<float>*)(q.work + (long long)block_number() * WKV6_WORK) + slot * (WKV6_TILE / 4) * S::THREADS + p.thread;
}

// Sums over the tokens so far: of gu, for the values of this thread; of a constant decay's gradient,
// for the key number lane % KEYS.
template <class S> struct Totals { Keys<S> u; float w; };

// One token: from G, the gradient of the state after it, to that of the state before it, `x`.
template <class S>
WKV_FN void token_gradient(State<S>& G, const State<S>& x, GradientMemory<S>& m, Totals<S>& totals, const Keys<S>& u,
                           int i_token, bool padding, const Place& p) {
  auto& at = m.tokens.x;
  Keys<S> r, w, k, of_r, of_w, of_k;
  Values<S> v, gy, of_v;
  keys<S>(r, at[R][i_token], p);
  keys<S>(w, at[W][i_token], p);
  keys<S>(k, at[K][i_token], p);
  values<S>(v, at[V][i_token], p);
  values<S>(gy, at[GY][i_token], p);
  float bonus = 0, of_bonus = 0;
  EACH_KEY bonus += r[i] * u[i] * k[i];
  EACH_VALUE of_bonus += v[j] * gy[j];
  EACH_VALUE of_v[j] = bonus * gy[j];
  EACH_KEY {
    of_r[i] = u[i] * k[i] * of_bonus;
    of_k[i] = u[i] * r[i] * of_bonus;
    of_w[i] = 0;
    totals.u[i] += r[i] * k[i] * of_bonus;
    EACH_VALUE {
      of_r[i] += x[i][j] * gy[j];
      of_w[i] += G[i][j] * x[i][j];
      of_k[i] += G[i][j] * v[j];
      of_v[j] += G[i][j] * k[i];
      G[i][j] = G[i][j] * w[i] + r[i] * gy[j];
    }
  }
  put_partial<S>(m.partial[i_token % S::FLUSH][p.warp], of_v, p);
  const int key = p.key + p.lane % S::KEYS;
  const float gr = sum_values<S>(of_r, p), gk = sum_values<S>(of_k, p);
  const float gw = sum_values<S>(of_w, p) * ((const float*)at[W][i_token])[key];
  if (!padding) totals.w += gw;
  warp_barrier();  // every thread has read r, w and k
  if (p.lane < S::KEYS) {
    ((float*)at[R][i_token])[key] = gr;
    ((float*)at[W][i_token])[key] = gw;
    ((float*)at[K][i_token])[key] = gk;
  }
}

// Writes the gradients of r, w and k for the staged tokens.
template <class S>
WKV_FN void write_gradients(const GradientMemory<S>& m, const Wkv6Args& q, const Place& p, long long begin) {
  using E = typename S::E;
  constexpr int VECTORS = S::BLOCK_KEYS / 4;
  for (int at = p.thread; at < S::STAGE * VECTORS; at += S::THREADS) {
    const long long t = begin + at / VECTORS;
    const int vector = p.key_block * VECTORS + at % VECTORS;
    if (t >= q.T || vector * 4 >= q.N) continue;
    const long long to = token(q, p, t) + vector * 4;
    UNROLL for (int kind = W; kind <= R; kind++) {
      if (kind == V) continue;
      const Four<float> found = m.tokens.x[kind][at / VECTORS][vector];
      if (kind == W) {
        if (!q.constant) *(Four<float>*)(q.gw + to) = found;
        continue;
      }
      Four<E> four;
      EACH_OF_4 store(&four.x[e], found.x[e]);
      *(Four<E>*)((E*)(kind == R ? q.gr : q.gk) + to) = four;
    }
  }
}

template <class S> WKV_FN void gradient(const Wkv6Args& q) {
  constexpr int Q = S::STATES, GROUPS = S::STAGE / Q, ALL = WKV6_SAVE_INTERVAL / S::STAGE;
  SHARED GradientMemory<S> m;
  const Place p = place<S>(q);
  State<S> G;
  Totals<S> totals = {};
  Keys<S> u;
  EACH_KEY u[i] = p.key + i < q.N ? q.u[p.head * q.N + p.key + i] : 0;
  if (q.ginitial) {
    read_state<S>(G, nullptr, q, p);
    write_state<S>(summed_state(q.ginitial, q, p), G, q, p);
  }
  read_state<S>(G, segment_state(q.glast, q, p), q, p);
  long long chunk = (p.end - 1) / WKV6_SAVE_INTERVAL;
  Fetched<S, GY + 1> next = fetch<S, GY + 1>(q, p, chunk * WKV6_SAVE_INTERVAL);
  const auto stage = [&](long long following) {
    barrier();
    put<S, GY + 1>(m.tokens, next, p);
    barrier();
    next = fetch<S, GY + 1>(q, p, following);
  };
  for (; chunk * WKV6_SAVE_INTERVAL >= p.begin; chunk--) {
    const long long begin = chunk * WKV6_SAVE_INTERVAL, before_begin = begin - WKV6_SAVE_INTERVAL;
    const long long left = (q.T - begin + S::STAGE - 1) / S::STAGE;
    const int parts = left < ALL ? (int)left : ALL;
    State<S> x;
    read_state<S>(x, saved(q, p, chunk), q, p);
    NO_UNROLL for (int part = 0; part < parts; part++) {
      const int then = part < parts - 1 ? part + 1 : parts - 2;
      stage(then < 0 ? before_begin : begin + then * S::STAGE);
      NO_UNROLL for (int i_token = 0; i_token < S::STAGE; i_token++) {
        const int slot = (part * S::STAGE + i_token) / Q - 1;
        if (i_token % Q == 0 && slot >= 0) {
          Four<float>* to = work<S>(q, p, slot);
          EACH_KEY EACH_GROUP {
            Four<float> four;
            EACH_OF_4 four.x[e] = x[i][4 * g + e];
            to[(i * (S::VALUES / 4) + g) * S::THREADS] = four;
          }
        }
        if (m.tokens.starts[i_token]) read_state<S>(x, state_of(q.initial, q, p), q, p);
        update<S>(x, x, m.tokens, i_token, p);
      }
    }
    NO_UNROLL for (int part = parts - 1; part >= 0; part--) {
      const long long part_begin = begin + part * S::STAGE;
      if (part < parts - 1) stage(part ? part_begin - S::STAGE : before_begin);
      NO_UNROLL for (int group = GROUPS - 1; group >= 0; group--) {
        const int base = group * Q, slot = part * GROUPS + group - 1;
        State<S> before[Q];
        if (slot < 0) read_state<S>(before[0], saved(q, p, chunk), q, p);
        else {
          const Four<float>* from = work<S>(q, p, slot);
          EACH_KEY EACH_GROUP {
            const Four<float> four = from[(i * (S::VALUES / 4) + g) * S::THREADS];
            EACH_OF_4 before[0][i][4 * g + e] = four.x[e];
          }
        }
        UNROLL for (int n = 0; n < Q; n++) {
          if (m.tokens.starts[base + n]) read_state<S>(before[n], state_of(q.initial, q, p), q, p);
          if (n < Q - 1) update<S>(before[n + 1 < Q ? n + 1 : n], before[n], m.tokens, base + n, p);
        }
        UNROLL for (int n = Q - 1; n >= 0; n--) {
          const long long t = part_begin + base + n;
          token_gradient<S>(G, before[n], m, totals, u, base + n, t >= q.T, p);
          if ((base + n) % S::FLUSH == 0) flush<S>(q.gv, m.partial, q, p, t);
          if (m.tokens.starts[base + n]) {  // the state before this token is the initial one
            if (q.ginitial) write_state<S, true>(summed_state(q.ginitial, q, p), G, q, p);
            EACH_KEY EACH_VALUE G[i][j] = 0;
          }
        }
      }
      write_gradients<S>(m, q, p, part_begin);  // after the barrier in flush
    }
  }
  if (p.begin == 0) write_state<S>(state_of(q.gfirst, q, p), G, q, p);
  const int key = p.key + p.lane % S::KEYS;
  const float gu = sum_values<S>(totals.u, p);
  if (p.lane < S::KEYS && key < q.N) {
    q.gu[summed_index(q, p) * q.N + key] = gu;
    if (q.constant) q.gw[summed_index(q, p) * q.N + key] = totals.w;
  }
}

// ---- the state before each segment, of several ----

// What a segment does to the state before it: multiplies its keys by `decays` and adds `states`. With `reverse`, r for k
// and gy for v, the same for the gradient of the state after it.
template <class S> WKV_FN void summary(const Wkv6Args& q) {
  SHARED Tokens<S, V + 1> tokens;
  const Place p = place<S>(q);
  if (p.segment == (q.reverse ? 0 : q.segments - 1)) return;  // no segment follows
  const long long last = p.begin + (p.end - p.begin - 1) / S::STAGE * S::STAGE, step = q.reverse ? -S::STAGE : S::STAGE;
  bool starts = false;
  State<S> x;
  Keys<S> decay;
  EACH_KEY decay[i] = 1;
  read_state<S>(x, nullptr, q, p);
  Fetched<S, V + 1> next = fetch<S, V + 1>(q, p, q.reverse ? last : p.begin);
  for (long long begin = q.reverse ? last : p.begin; begin >= p.begin && begin <= last; begin += step) {
    barrier();
    put<S, V + 1>(tokens, next, p);
    barrier();
    next = fetch<S, V + 1>(q, p, begin + step);
    _Pragma("unroll 2") for (int n = 0; n < S::STAGE; n++) {
      const int i_token = q.reverse ? S::STAGE - 1 - n : n;
      const bool start = tokens.starts[i_token];
      starts = starts || start;
      if (start && !q.reverse) read_state<S>(x, state_of(q.initial, q, p), q, p);
      Keys<S> w;
      keys<S>(w, tokens.x[W][i_token], p);
      EACH_KEY decay[i] *= w[i];
      update<S>(x, x, tokens, i_token, p);
      if (start && q.reverse) read_state<S>(x, nullptr, q, p);
    }
  }
  const long long segment = p.index * q.segments + p.segment;
  write_state<S>(q.states + segment * q.N * q.N, x, q, p);
  if (p.lane == 0) EACH_KEY if (p.key + i < q.N) q.decays[segment * q.N + p.key + i] = starts ? -1 : decay[i];
}

// Replaces these `states` by the states before the segments (after them, with `reverse`). Each thread has 4 values; it
// loads those of AHEAD segments at once.
WKV_FN void scan(const Wkv6Args& q) {
  constexpr int AHEAD = 8;
  const long long at = thread_index() * 4, size = q.N * q.N, index = at / size, element = at % size;
  if (index >= q.B * q.H) return;
  Four<float> x = {};
  if (q.first) x = *(const Four<float>*)(q.first + at);
  for (long long begin = 0; begin < q.segments; begin += AHEAD) {
    Four<float> own[AHEAD];
    float decay[AHEAD];
    const auto segment = [&](int n) { return index * q.segments + (q.reverse ? q.segments - 1 - begin - n : begin + n); };
    UNROLL for (int n = 0; n < AHEAD; n++) if (begin + n < q.segments - 1) {  // the last one has no summary
      own[n] = *(const Four<float>*)(q.states + segment(n) * size + element);
      decay[n] = q.decays[segment(n) * q.N + element / q.N];
    }
    UNROLL for (int n = 0; n < AHEAD; n++) if (begin + n < q.segments) {
      *(Four<float>*)(q.states + segment(n) * size + element) = x;
      if (begin + n == q.segments - 1) return;
      EACH_OF_4 x.x[e] = decay[n] < 0 ? own[n].x[e] : decay[n] * x.x[e] + own[n].x[e];
    }
  }
}

// Heads of up to 64 elements, and larger ones, in fp32 only.
template <class E> using Narrow = Shape<E, 64, 8>;
using Wide = Shape<fp32, 256, 2>;

#define KERNELS_OF(E)                                                                         \
  KERNEL(32 * WKV6_WARPS, 3) wkv6_summary_##E(const Wkv6Args q) { summary<Narrow<E>>(q); }    \
  KERNEL(32 * WKV6_WARPS, 2) wkv6_output_##E(const Wkv6Args q) { output<Narrow<E>>(q); }      \
  KERNEL(32 * WKV6_WARPS, 1) wkv6_gradient_##E(const Wkv6Args q) { gradient<Narrow<E>>(q); }
KERNELS_OF(fp32)
KERNELS_OF(bf16)
KERNELS_OF(fp16)
#undef KERNELS_OF
KERNEL(32 * WKV6_WARPS, 3) wkv6_summary_wide(const Wkv6Args q) { summary<Wide>(q); }
KERNEL(32 * WKV6_WARPS, 3) wkv6_scan(const Wkv6Args q) { scan(q); }
KERNEL(32 * WKV6_WARPS, 1) wkv6_output_wide(const Wkv6Args q) { output<Wide>(q); }
KERNEL(32 * WKV6_WARPS, 1) wkv6_gradient_wide(const Wkv6Args q) { gradient<Wide>(q); }

}  // namespace wkv6

#undef UNROLL
#undef NO_UNROLL
#undef EACH_KEY
#undef EACH_VALUE
#undef EACH_GROUP
#undef EACH_OF_4
