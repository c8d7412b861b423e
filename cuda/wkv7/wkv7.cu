// WKV7 kernels: the recurrence, token by token, with the state in registers.
//
// The rows of a state (its values) do not interact in the forward pass, so a warp has 8 rows and all
// columns (keys), and sums over columns by shuffles; sums over rows, which gradients need, pass
// through shared memory. A thread has a tile of ROWS rows, and of each group of 4 * LANES columns 4
// adjacent ones. Tokens are staged in shared memory, with e^w for w; the next ones are loaded
// meanwhile. Tokens after the last and columns and rows beyond N are zeros, and change nothing.
//
// Backward, WKV7_SAVE_INTERVAL tokens at a time: the first pass goes from the saved state through all of
// them and puts every Q-th state into `work`; then, from the last to the first, Q states are
// recomputed in registers. No atomics: results are bit-identical.
//
// Compiled by NVRTC as part of gpu.cu; tests also compile it for the host.
#include "wkv7/wkv7_tile.h"

namespace wkv7 {

// ---- forward ----

// S = S_before e^w + s b^T + v k^T
template <class S, class T> WKV_FN void update(State<S>& x, const Values<S>& s, const T& at, int i_token, const Place& p) {
  Keys<S> w, k, b;
  Values<S> v;
  keys<S>(w, at.x[W][i_token], p);
  keys<S>(k, at.x[K][i_token], p);
  keys<S>(b, at.x[B][i_token], p);
  values<S>(v, at.x[V][i_token], p.row);
  EACH_ROW EACH_COLUMN x[i][j] = x[i][j] * w[j] + (s[i] * b[j] + v[i] * k[j]);
}
// s = S a
template <class S, class T> WKV_FN void removed(Values<S>& s, const State<S>& x, const T& at, int i_token, const Place& p) {
  Keys<S> a;
  keys<S>(a, at.x[A][i_token], p);
  EACH_ROW s[i] = dot<S>(x[i], a);
  sum_columns<S>(s, p);
}

// The staged tokens. y of a token is summed over columns together with s of the next one: the state
// does not wait for it.
template <class S, bool RESETS>
WKV_FN void outputs(Four<float> (&ys)[S::STAGE][S::BLOCK_ROWS / 4], State<S>& x, const Tokens<S, B + 1>& tokens,
                    const Wkv7Args& q, const Place& p) {
  float sums[2 * S::ROWS];  // s, then y of the token before
  const auto write = [&](int i_token) {
    if (p.lane == 0) EACH_ROW ((float*)ys[i_token])[p.local + i] = sums[S::ROWS + i];
  };
  EACH_ROW sums[S::ROWS + i] = 0;
  _Pragma("unroll 2") for (int i_token = 0; i_token < S::STAGE; i_token++) {
    if (RESETS && tokens.starts[i_token]) read_state<S>(x, state_of(q.initial, q, p), q, p);
    Keys<S> key;
    keys<S>(key, tokens.x[A][i_token], p);
    EACH_ROW sums[i] = dot<S>(x[i], key);
    sum_columns<S>(sums, p);
    if (i_token) write(i_token - 1);
    Values<S> s;
    EACH_ROW s[i] = sums[i];
    update<S>(x, s, tokens, i_token, p);
    keys<S>(key, tokens.x[R][i_token], p);
    EACH_ROW sums[S::ROWS + i] = dot<S>(x[i], key);
  }
  sum_columns<S>(sums, p);
  write(S::STAGE - 1);
}

template <class S> WKV_FN void output(const Wkv7Args& q) {
  using E = typename S::E;
  SHARED Tokens<S, B + 1> tokens;
  SHARED Four<float> ys[S::STAGE][S::BLOCK_ROWS / 4];
  const Place p = place<S>(q);
  State<S> x;
  read_state<S>(x, state_of(q.first, q, p), q, p);
  Fetched<S, B + 1> next = fetch<S, B + 1>(q, p, 0);
  for (long long begin = 0; begin < q.T; begin += S::STAGE) {
    if (begin % WKV7_SAVE_INTERVAL == 0) write_state<S>(saved(q, p, begin / WKV7_SAVE_INTERVAL), x, q, p);
    barrier();
    put<S, B + 1>(tokens, next, p, 0);
    barrier();
    next = fetch<S, B + 1>(q, p, begin + S::STAGE);
    if (any_starts<S, B + 1>(tokens)) outputs<S, true>(ys, x, tokens, q, p);
    else outputs<S, false>(ys, x, tokens, q, p);
    barrier();
    constexpr int VECTORS = S::BLOCK_ROWS / 4;
    for (int at = p.thread; at < S::STAGE * VECTORS; at += S::THREADS) {
      const long long t = begin + at / VECTORS;
      const int row = p.row_block * S::BLOCK_ROWS + at % VECTORS * 4;
      if (t >= q.T || row >= q.N) continue;
      Four<E> four;
      EACH_OF_4 store(&four.x[e], ys[at / VECTORS][at % VECTORS].x[e]);
      *(Four<E>*)((E*)q.y + token(q, p, t) + row) = four;
    }
  }
  write_state<S>(state_of(q.last, q, p), x, q, p);
}

// ---- backward ----

enum { OF_R, OF_W, OF_K, OF_A, OF_B, SUMS };  // sums over rows

// A thread's part of a state of `work`, which no other thread reads.
template <class S> WKV_FN Four<float>* work(const Wkv7Args& q, const Place& p, int slot) {
  return (Four<float>*)(q.work + (long long)block_number() * wkv7_work_floats(S::WIDTH, S::WARPS)) +
         slot * (S::ROWS * S::COLUMNS / 4) * S::THREADS + p.thread;
}

template <class S> struct GradientMemory {
  Tokens<S, GY + 1> tokens;
  Four<float> values[WKV7_SAVE_INTERVAL][S::BLOCK_ROWS / 4];  // s; the backward pass replaces it by gv
  Four<float> partial[S::WARPS][SUMS][S::VECTORS];
};

// Partial sums over this warp's rows.
template <class S> WKV_FN void put_partial(Four<float>* to, const Keys<S>& x, const Place& p) {
  static_assert(S::LANES == 16, "two threads of a warp have the same columns");
  const bool second = p.thread & 16;
  EACH_GROUP {
    const float* four = x + 4 * g;
    const float low = (second ? four[2] : four[0]) + shuffle_xor(second ? four[0] : four[2], 16);
    const float high = (second ? four[3] : four[1]) + shuffle_xor(second ? four[1] : four[3], 16);
    float* at = to[g * S::LANES + p.lane].x + 2 * second;
    at[0] = low;
    at[1] = high;
  }
}
// Sums the partial sums of token t and writes them as gradients; between barriers.
template <class S>
WKV_FN void write_sums(const GradientMemory<S>& m, const Wkv7Args& q, const Place& p, long long t, int i_token) {
  using E = typename S::E;
  for (int item = p.thread; item < SUMS * S::VECTORS; item += S::THREADS) {
    const int kind = item / S::VECTORS, vector = item % S::VECTORS;
    if (t >= q.T || vector * 4 >= q.N) continue;
    Four<float> sum = {};
    UNROLL for (int warp = 0; warp < S::WARPS; warp++) {
      const Four<float> part = m.partial[warp][kind][vector];
      EACH_OF_4 sum.x[e] += part.x[e];
    }
    const long long at = p.row_block * q.B * q.T * q.H * q.N + token(q, p, t) + vector * 4;
    if (kind == OF_W) {
      const Four<float> decay = m.tokens.x[W][i_token][vector];
      EACH_OF_4 sum.x[e] *= decay.x[e];
      *(Four<float>*)(q.gw + at) = sum;
    } else {
      void* to = kind == OF_R ? q.gr : kind == OF_K ? q.gk : kind == OF_A ? q.ga : q.gb;
      Four<E> four;
      EACH_OF_4 store(&four.x[e], sum.x[e]);
      *(Four<E>*)((E*)to + at) = four;
    }
  }
}

// One token: from G, the gradient of the state after it, to that of the state before it, `x`.
template <class S>
WKV_FN void token_gradient(State<S>& G, const State<S>& x, GradientMemory<S>& m, int i_token, int slot,
                           const Place& p) {
  const auto& at = m.tokens;
  const int warp = p.thread / 32;
  Values<S> gy, v, s, gs, gv;
  Keys<S> key, sum_k, sum_b, sum_w;
  values<S>(gy, at.x[GY][i_token], p.row);
  keys<S>(key, at.x[R][i_token], p);
  EACH_ROW EACH_COLUMN G[i][j] += gy[i] * key[j];
  keys<S>(key, at.x[B][i_token], p);
  EACH_ROW gs[i] = dot<S>(G[i], key);
  keys<S>(key, at.x[K][i_token], p);
  EACH_ROW gv[i] = dot<S>(G[i], key);
  sum_columns<S>(gs, p);
  sum_columns<S>(gv, p);
  values<S>(v, at.x[V][i_token], p.row);
  float* here = (float*)m.values[slot] + p.local;
  EACH_ROW s[i] = here[i];
  EACH_COLUMN {
    sum_k[j] = sum_b[j] = sum_w[j] = 0;
    EACH_ROW {
      sum_k[j] += G[i][j] * v[i];
      sum_b[j] += G[i][j] * s[i];
      sum_w[j] += G[i][j] * x[i][j];
    }
  }
  put_partial<S>(m.partial[warp][OF_K], sum_k, p);
  put_partial<S>(m.partial[warp][OF_B], sum_b, p);
  put_partial<S>(m.partial[warp][OF_W], sum_w, p);
  EACH_COLUMN {
    sum_k[j] = 0;
    EACH_ROW sum_k[j] += x[i][j] * gs[i];
  }
  put_partial<S>(m.partial[warp][OF_A], sum_k, p);
  Keys<S> w;
  keys<S>(w, at.x[W][i_token], p);
  keys<S>(key, at.x[A][i_token], p);
  EACH_ROW EACH_COLUMN G[i][j] = G[i][j] * w[j] + gs[i] * key[j];
  warp_barrier();  // every thread has read s
  if (p.lane == 0) EACH_ROW here[i] = gv[i];
}

template <class S> WKV_FN void gradient(const Wkv7Args& q) {
  using E = typename S::E;
  constexpr int Q = wkv7_states(S::WIDTH), PARTS = WKV7_SAVE_INTERVAL / S::STAGE;
  SHARED GradientMemory<S> m;
  const Place p = place<S>(q);
  const int warp = p.thread / 32;
  State<S> G, x;
  read_state<S>(G, state_of(q.glast, q, p), q, p);
  if (q.ginitial) {
    EACH_ROW EACH_COLUMN x[i][j] = 0;
    write_state<S>(state_of(q.ginitial, q, p), x, q, p);
  }
  const long long chunks = (q.T + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL;
  Fetched<S, GY + 1> next;
  if (PARTS == 1) next = fetch<S, GY + 1>(q, p, (chunks - 1) * WKV7_SAVE_INTERVAL);
  for (long long chunk = chunks - 1; chunk >= 0; chunk--) {
    const long long begin = chunk * WKV7_SAVE_INTERVAL;
    const auto stage = [&](int part) {
      if (PARTS > 1) next = fetch<S, GY + 1>(q, p, begin + part * S::STAGE);
      barrier();
      put<S, GY + 1>(m.tokens, next, p, part * S::STAGE);
      barrier();
      if (PARTS == 1 && chunk) next = fetch<S, GY + 1>(q, p, begin - WKV7_SAVE_INTERVAL);
    };
    read_state<S>(x, saved(q, p, chunk), q, p);
    NO_UNROLL for (int part = 0; part < PARTS; part++) {
      stage(part);
      NO_UNROLL for (int i_token = 0; i_token < S::STAGE; i_token++) {
        const int slot = part * S::STAGE + i_token;
        if (slot && slot % Q == 0) {
          Four<float>* to = work<S>(q, p, slot / Q - 1);
          EACH_ROW EACH_GROUP {
            Four<float> four;
            EACH_OF_4 four.x[e] = x[i][4 * g + e];
            to[(i * S::COLUMNS / 4 + g) * S::THREADS] = four;
          }
        }
        if (m.tokens.starts[slot]) read_state<S>(x, state_of(q.initial, q, p), q, p);
        Values<S> s;
        removed<S>(s, x, m.tokens, i_token, p);
        if (p.lane == 0) EACH_ROW ((float*)m.values[slot])[p.local + i] = s[i];
        update<S>(x, s, m.tokens, i_token, p);
      }
    }
    warp_barrier();
    NO_UNROLL for (int part = PARTS - 1; part >= 0; part--) {
      if (part < PARTS - 1) stage(part);
      NO_UNROLL for (int base = S::STAGE - Q; base >= 0; base -= Q) {
        const int base_slot = part * S::STAGE + base;
        if (base_slot == 0) read_state<S>(x, saved(q, p, chunk), q, p);
        else {
          const Four<float>* from = work<S>(q, p, base_slot / Q - 1);
          EACH_ROW EACH_GROUP {
            const Four<float> four = from[(i * (S::COLUMNS / 4) + g) * S::THREADS];
            EACH_OF_4 x[i][4 * g + e] = four.x[e];
          }
        }
        State<S> before[Q];
        Keys<S> sum_r[Q];
        UNROLL for (int n = 0; n < Q; n++) {
          if (m.tokens.starts[base_slot + n]) read_state<S>(x, state_of(q.initial, q, p), q, p);
          EACH_ROW EACH_COLUMN before[n][i][j] = x[i][j];
          Values<S> s, gy;
          EACH_ROW s[i] = ((const float*)m.values[base_slot + n])[p.local + i];
          values<S>(gy, m.tokens.x[GY][base + n], p.row);
          update<S>(x, s, m.tokens, base + n, p);
          EACH_COLUMN {
            sum_r[n][j] = 0;
            EACH_ROW sum_r[n][j] += x[i][j] * gy[i];
          }
        }
        UNROLL for (int n = Q - 1; n >= 0; n--) {
          put_partial<S>(m.partial[warp][OF_R], sum_r[n], p);
          token_gradient<S>(G, before[n], m, base + n, base_slot + n, p);
          barrier();
          write_sums<S>(m, q, p, begin + base_slot + n, base + n);
          barrier();
          if (m.tokens.starts[base_slot + n]) {  // the state before this token is the initial one
            if (q.ginitial) write_state<S, true>(state_of(q.ginitial, q, p), G, q, p);
            EACH_ROW EACH_COLUMN G[i][j] = 0;
          }
        }
      }
    }
    constexpr int VECTORS = S::BLOCK_ROWS / 4;
    for (int at = p.thread; at < WKV7_SAVE_INTERVAL * VECTORS; at += S::THREADS) {
      const long long t = begin + at / VECTORS;
      const int row = p.row_block * S::BLOCK_ROWS + at % VECTORS * 4;
      if (t >= q.T || row >= q.N) continue;
      Four<E> four;
      EACH_OF_4 store(&four.x[e], m.values[at / VECTORS][at % VECTORS].x[e]);
      *(Four<E>*)((E*)q.gv + token(q, p, t) + row) = four;
    }
  }
  write_state<S>(state_of(q.gfirst, q, p), G, q, p);
}

#define KERNELS_OF(E)                                                                                              \
  KERNEL(32 * WKV7_WARPS, 2) wkv7_output_##E(const Wkv7Args q) { output<Shape<E, 64, 2, WKV7_WARPS>>(q); }          \
  KERNEL(32 * WKV7_WARPS, 1) wkv7_gradient_##E(const Wkv7Args q) { gradient<Shape<E, 64, 4, WKV7_WARPS>>(q); }
KERNELS_OF(fp32)
KERNELS_OF(bf16)
KERNELS_OF(fp16)
#undef KERNELS_OF
// Heads of more than 64 elements: fp32 only
KERNEL(32 * WKV7_WARPS, 1) wkv7_output_128(const Wkv7Args q) { output<Shape<fp32, 128, 2, WKV7_WARPS>>(q); }
KERNEL(32 * WKV7_WARPS, 1) wkv7_output_256(const Wkv7Args q) { output<Shape<fp32, 256, 2, WKV7_WARPS>>(q); }
KERNEL(32 * WKV7_WIDE_WARPS) wkv7_gradient_128(const Wkv7Args q) { gradient<Shape<fp32, 128, 4, WKV7_WIDE_WARPS>>(q); }
KERNEL(32 * WKV7_WIDE_WARPS) wkv7_gradient_256(const Wkv7Args q) { gradient<Shape<fp32, 256, 4, WKV7_WIDE_WARPS>>(q); }

}  // namespace wkv7
