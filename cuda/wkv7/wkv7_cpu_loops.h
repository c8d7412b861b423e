// The CPU loops of WKV7. Each cpu_*.cpp includes this file with WKV_BYTES set to its vector width.
//
// A head's state is stored transposed, S[key][value], so that vectors run over the values and no
// step of the forward pass needs a sum across a vector:
//     sa = sum_j S[j] a_j;   S[j] = S[j] w_j + sa b_j + v k_j;   y = sum_j S[j] r_j
// The backward pass recomputes the states of WKV7_SAVE_INTERVAL tokens from the saved one before
// them.
#include "common/cpu_heads.h"
#include "wkv7/wkv7_cpu.h"

namespace wkv7_loops {
namespace {

// The state number `index` of [B, H, N (value), N (key)], transposed; zeros if there are none.
WKV_FN void read_state(float* to, const float* states, int64_t index, int64_t N) {
  if (states) transpose(to, states + index * N * N, N);
  else __builtin_memset(to, 0, N * N * sizeof(float));
}

struct Token {
  float r[WKV7_MAX_N], w[WKV7_MAX_N], k[WKV7_MAX_N], v[WKV7_MAX_N], a[WKV7_MAX_N], b[WKV7_MAX_N];
};

template <class E> WKV_FN void read_token(Token& x, const Wkv7Problem& q, int64_t at, int64_t N) {
  read_row<E>(x.r, q.r, at, N);
  read_row<E>(x.k, q.k, at, N);
  read_row<E>(x.v, q.v, at, N);
  read_row<E>(x.a, q.a, at, N);
  read_row<E>(x.b, q.b, at, N);
  for (int64_t i = 0; i < N; i += LANES) put(x.w + i, wkv_exp(vector_at(q.w + at + i)));
}

// One token: from the state `from` before it to the state `to` after it (they may be the same), sa,
// and with OUTPUT y.
template <int FIXED, bool OUTPUT>
WKV_FN void step(float* to, const float* from, const Token& x, float* sa, float* y, int64_t size) {
  const int64_t N = FIXED ? FIXED : size;
  constexpr int G = Group<FIXED>::count;
  for (int64_t c = 0; c < N; c += Group<FIXED>::columns) {
    wkv_float s[G] = {}, out[G] = {}, v[G];
    for (int64_t j = 0; j < N; j++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) s[g] += vector_at(from + j * N + c + g * LANES) * x.a[j];
    for (int g = 0; g < G; g++) v[g] = vector_at(x.v + c + g * LANES);
    for (int64_t j = 0; j < N; j++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const wkv_float S = vector_at(from + j * N + c + g * LANES) * x.w[j] + s[g] * x.b[j] + v[g] * x.k[j];
        put(to + j * N + c + g * LANES, S);
        if (OUTPUT) out[g] += S * x.r[j];
      }
    for (int g = 0; g < G; g++) {
      put(sa + c + g * LANES, s[g]);
      if (OUTPUT) put(y + c + g * LANES, out[g]);
    }
  }
}

template <class E, int FIXED>
void forward(const Wkv7Problem& q, const Wkv7Outputs& out, int64_t row, int64_t head, float* S) {
  const int64_t N = FIXED ? FIXED : q.N, index = row * q.H + head;
  const int64_t chunks = (q.T + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL;
  Token x;
  float sa[WKV7_MAX_N], y[WKV7_MAX_N];
  read_state(S, q.first, index, N);
  for (int64_t t = 0; t < q.T; t++) {
    if (t % WKV7_SAVE_INTERVAL == 0)
      __builtin_memcpy(q.saved + (index * chunks + t / WKV7_SAVE_INTERVAL) * N * N, S, N * N * sizeof(float));
    if (q.reset && q.reset[row * q.T + t]) read_state(S, q.initial, index, N);
    const int64_t at = ((row * q.T + t) * q.H + head) * N;
    read_token<E>(x, q, at, N);
    step<FIXED, true>(S, S, x, sa, y, N);
    write_row<E>(out.y, at, y, N);
  }
  transpose(out.last + index * N * N, S, N);
}

// Gradients of one token; of_x is the gradient of x. S0, S1: the states before and after the token.
// G: the gradient of S1, replaced by that of S0.
template <int FIXED>
WKV_FN void step_backward(float* G, const float* S0, const float* S1, const Token& x, const float* sa, const float* gy,
                          Token& grad, int64_t size) {
  const int64_t N = FIXED ? FIXED : size;
  constexpr int V = Group<FIXED>::count;
  float gsa[WKV7_MAX_N];
  for (int64_t c = 0; c < N; c += Group<FIXED>::columns) {
    wkv_float of_y[V], of_v[V] = {}, of_sa[V] = {};
    for (int g = 0; g < V; g++) of_y[g] = vector_at(gy + c + g * LANES);
    for (int64_t j = 0; j < N; j++)
#pragma GCC unroll 4
      for (int g = 0; g < V; g++) {
        float* at = G + j * N + c + g * LANES;
        const wkv_float sum = vector_at(at) + of_y[g] * x.r[j];
        put(at, sum);
        of_v[g] += sum * x.k[j];
        of_sa[g] += sum * x.b[j];
      }
    for (int g = 0; g < V; g++) {
      put(grad.v + c + g * LANES, of_v[g]);
      put(gsa + c + g * LANES, of_sa[g]);
    }
  }
  for (int64_t j = 0; j < N; j++) {
    wkv_float r = {}, w = {}, k = {}, a = {}, b = {};
    for (int64_t i = 0; i < N; i += LANES) {
      float* at = G + j * N + i;
      const wkv_float of_S = vector_at(at), before = vector_at(S0 + j * N + i), of_sa = vector_at(gsa + i);
      r += vector_at(S1 + j * N + i) * vector_at(gy + i);
      w += of_S * before;
      k += of_S * vector_at(x.v + i);
      b += of_S * vector_at(sa + i);
      a += before * of_sa;
      put(at, of_S * x.w[j] + of_sa * x.a[j]);
    }
    grad.r[j] = sum(r), grad.w[j] = sum(w) * x.w[j], grad.k[j] = sum(k), grad.a[j] = sum(a), grad.b[j] = sum(b);
  }
}

template <class E, int FIXED>
void backward(const Wkv7Problem& q, const Wkv7Gradients& grad, int64_t row, int64_t head, float* scratch) {
  const int64_t N = FIXED ? FIXED : q.N, index = row * q.H + head;
  const int64_t chunks = (q.T + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL;
  float *const G = scratch, *const spare = G + N * N, *const states = spare + N * N;
  float* const sa = states + (WKV7_SAVE_INTERVAL + 1) * N * N;
  Token x, g;
  float gy[WKV7_MAX_N];
  read_state(G, grad.last, index, N);
  if (grad.initial) __builtin_memset(grad.initial + index * N * N, 0, N * N * sizeof(float));
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * WKV7_SAVE_INTERVAL, next = begin + WKV7_SAVE_INTERVAL, end = next < q.T ? next : q.T;
    __builtin_memcpy(states, q.saved + (index * chunks + chunk) * N * N, N * N * sizeof(float));
    for (int64_t t = begin; t < end; t++) {
      float* before = states + (t - begin) * N * N;
      if (q.reset && q.reset[row * q.T + t]) read_state(before, q.initial, index, N);
      read_token<E>(x, q, ((row * q.T + t) * q.H + head) * N, N);
      step<FIXED, false>(before + N * N, before, x, sa + (t - begin) * N, nullptr, N);
    }
    for (int64_t t = end - 1; t >= begin; t--) {
      const int64_t at = ((row * q.T + t) * q.H + head) * N;
      const bool starts = q.reset && q.reset[row * q.T + t];
      float* before = states + (t - begin) * N * N;
      read_token<E>(x, q, at, N);
      read_row<E>(gy, grad.y, at, N);
      const float* after = before + N * N;
      if (t + 1 < end && q.reset && q.reset[row * q.T + t + 1]) {  // it was overwritten by the initial state
        step<FIXED, false>(spare, before, x, sa + (t - begin) * N, nullptr, N);
        after = spare;
      }
      step_backward<FIXED>(G, before, after, x, sa + (t - begin) * N, gy, g, N);
      write_row<E>(grad.r, at, g.r, N);
      write_row<E>(grad.k, at, g.k, N);
      write_row<E>(grad.v, at, g.v, N);
      write_row<E>(grad.a, at, g.a, N);
      write_row<E>(grad.b, at, g.b, N);
      __builtin_memcpy(grad.w + at, g.w, N * sizeof(float));
      if (!starts) continue;
      if (grad.initial)
        for (int64_t i = 0; i < N; i++)
          for (int64_t j = 0; j < N; j++) grad.initial[(index * N + i) * N + j] += G[j * N + i];
      __builtin_memset(G, 0, N * N * sizeof(float));
    }
  }
  transpose(grad.first + index * N * N, G, N);
}

template <class E>
void any_forward(const Wkv7Problem& q, const Wkv7Outputs& out, int64_t row, int64_t head, float* scratch) {
  if (q.N == 64) forward<E, 64>(q, out, row, head, scratch);
  else forward<E, 0>(q, out, row, head, scratch);
}
template <class E>
void any_backward(const Wkv7Problem& q, const Wkv7Gradients& grad, int64_t row, int64_t head, float* scratch) {
  if (q.N == 64) backward<E, 64>(q, grad, row, head, scratch);
  else backward<E, 0>(q, grad, row, head, scratch);
}

}  // namespace
}  // namespace wkv7_loops

const Wkv7Loops LOOPS(wkv7) = {{wkv7_loops::any_forward<float>, wkv7_loops::any_forward<bf16>},
                               {wkv7_loops::any_backward<float>, wkv7_loops::any_backward<bf16>}};
