// The CPU loops of WKV6. Each cpu_*.cpp includes this file with WKV_BYTES set to its vector width.
//
// A head's state is S[key][value]; vectors run over the values:
//     y = sum_j S[j] r_j + v (sum_j r_j u_j k_j);   S[j] = S[j] w_j + v k_j
// The backward pass recomputes the states of WKV6_SAVE_INTERVAL tokens from the saved one before
// them.
#include "common/cpu_heads.h"
#include "wkv6/wkv6_cpu.h"

namespace wkv6_loops {
namespace {

// The state number `index` of [B, H, N, N]; zeros if there are none.
WKV_FN void read_state(float* to, const float* states, int64_t index, int64_t N) {
  if (states) __builtin_memcpy(to, states + index * N * N, N * N * sizeof(float));
  else __builtin_memset(to, 0, N * N * sizeof(float));
}

struct Token { float r[WKV6_MAX_N], w[WKV6_MAX_N], k[WKV6_MAX_N], v[WKV6_MAX_N]; };

// Decays of one token from log-decays.
WKV_FN void read_decays(Token& x, const float* w, int64_t N) {
  for (int64_t i = 0; i < N; i += LANES) put(x.w + i, wkv_exp(vector_at(w + i)));
}
template <class E> WKV_FN void read_token(Token& x, const Wkv6Problem& q, int64_t at, int64_t N) {
  read_row<E>(x.r, q.r, at, N);
  read_row<E>(x.k, q.k, at, N);
  read_row<E>(x.v, q.v, at, N);
  if (!q.constant) read_decays(x, q.w + at, N);
}

// sum_j r_j u_j k_j
WKV_FN float bonus_of(const Token& x, const float* u, int64_t N) {
  wkv_float total = {};
  for (int64_t i = 0; i < N; i += LANES) total += vector_at(x.r + i) * vector_at(u + i) * vector_at(x.k + i);
  return sum(total);
}

// One token: from the state `from` before it to the state `to` after it (they may be the same), and
// with OUTPUT y.
template <int FIXED, bool OUTPUT>
WKV_FN void step(float* to, const float* from, const Token& x, const float* u, float* y, int64_t size) {
  const int64_t N = FIXED ? FIXED : size;
  constexpr int G = Group<FIXED>::count;
  const float bonus = OUTPUT ? bonus_of(x, u, N) : 0;
  for (int64_t c = 0; c < N; c += Group<FIXED>::columns) {
    wkv_float out[G] = {}, v[G];
    for (int g = 0; g < G; g++) v[g] = vector_at(x.v + c + g * LANES);
    for (int64_t j = 0; j < N; j++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const wkv_float S = vector_at(from + j * N + c + g * LANES);
        if (OUTPUT) out[g] += S * x.r[j];
        put(to + j * N + c + g * LANES, S * x.w[j] + v[g] * x.k[j]);
      }
    if (OUTPUT)
      for (int g = 0; g < G; g++) put(y + c + g * LANES, out[g] + v[g] * bonus);
  }
}

template <class E, int FIXED>
void forward(const Wkv6Problem& q, const Wkv6Outputs& out, int64_t row, int64_t head, float* S) {
  const int64_t N = FIXED ? FIXED : q.N, index = row * q.H + head;
  const int64_t chunks = (q.T + WKV6_SAVE_INTERVAL - 1) / WKV6_SAVE_INTERVAL;
  const float* const u = q.u + head * N;
  Token x;
  float y[WKV6_MAX_N];
  if (q.constant) read_decays(x, q.w + head * N, N);
  read_state(S, q.first, index, N);
  for (int64_t t = 0; t < q.T; t++) {
    if (t % WKV6_SAVE_INTERVAL == 0)
      __builtin_memcpy(q.saved + (index * chunks + t / WKV6_SAVE_INTERVAL) * N * N, S, N * N * sizeof(float));
    if (q.reset && q.reset[row * q.T + t]) read_state(S, q.initial, index, N);
    const int64_t at = ((row * q.T + t) * q.H + head) * N;
    read_token<E>(x, q, at, N);
    step<FIXED, true>(S, S, x, u, y, N);
    write_row<E>(out.y, at, y, N);
  }
  __builtin_memcpy(out.last + index * N * N, S, N * N * sizeof(float));
}

// Gradients of one token; of_x is the gradient of x. S: the state before the token. G: the gradient
// of the state after it; on return, that of S. Adds to gu, and overwrites grad.
template <int FIXED>
WKV_FN void step_backward(float* G, const float* S, const Token& x, const float* u, const float* gy, Token& grad,
                          float* gu, int64_t size) {
  const int64_t N = FIXED ? FIXED : size;
  constexpr int V = Group<FIXED>::count;
  const float bonus = bonus_of(x, u, N);
  wkv_float total = {};
  for (int64_t c = 0; c < N; c += Group<FIXED>::columns) {
    wkv_float of_v[V] = {};
    for (int64_t j = 0; j < N; j++)
#pragma GCC unroll 4
      for (int g = 0; g < V; g++) of_v[g] += vector_at(G + j * N + c + g * LANES) * x.k[j];
    for (int g = 0; g < V; g++) {
      const wkv_float of_y = vector_at(gy + c + g * LANES);
      put(grad.v + c + g * LANES, of_v[g] + of_y * bonus);
      total += of_y * vector_at(x.v + c + g * LANES);
    }
  }
  const float of_bonus = sum(total);
  for (int64_t j = 0; j < N; j++) {
    wkv_float r = {}, w = {}, k = {};
    for (int64_t i = 0; i < N; i += LANES) {
      float* at = G + j * N + i;
      const wkv_float of_S = vector_at(at), before = vector_at(S + j * N + i), of_y = vector_at(gy + i);
      r += before * of_y;
      w += before * of_S;
      k += of_S * vector_at(x.v + i);
      put(at, of_S * x.w[j] + of_y * x.r[j]);
    }
    grad.r[j] = sum(r) + u[j] * x.k[j] * of_bonus;
    grad.k[j] = sum(k) + u[j] * x.r[j] * of_bonus;
    grad.w[j] = sum(w) * x.w[j];
    gu[j] += x.r[j] * x.k[j] * of_bonus;
  }
}

template <class E, int FIXED>
void backward(const Wkv6Problem& q, const Wkv6Gradients& grad, int64_t row, int64_t head, float* scratch) {
  const int64_t N = FIXED ? FIXED : q.N, index = row * q.H + head;
  const int64_t chunks = (q.T + WKV6_SAVE_INTERVAL - 1) / WKV6_SAVE_INTERVAL;
  const float* const u = q.u + head * N;
  float *const G = scratch, *const states = G + N * N, *const gu = grad.u + index * N;
  Token x, g;
  float gy[WKV6_MAX_N];
  if (q.constant) {
    read_decays(x, q.w + head * N, N);
    __builtin_memset(grad.w + index * N, 0, N * sizeof(float));
  }
  __builtin_memset(gu, 0, N * sizeof(float));
  read_state(G, grad.last, index, N);
  if (grad.initial) __builtin_memset(grad.initial + index * N * N, 0, N * N * sizeof(float));
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * WKV6_SAVE_INTERVAL, next = begin + WKV6_SAVE_INTERVAL, end = next < q.T ? next : q.T;
    __builtin_memcpy(states, q.saved + (index * chunks + chunk) * N * N, N * N * sizeof(float));
    for (int64_t t = begin; t < end; t++) {
      float* before = states + (t - begin) * N * N;
      if (q.reset && q.reset[row * q.T + t]) read_state(before, q.initial, index, N);
      if (t + 1 == end) break;
      read_token<E>(x, q, ((row * q.T + t) * q.H + head) * N, N);
      step<FIXED, false>(before + N * N, before, x, u, nullptr, N);
    }
    for (int64_t t = end - 1; t >= begin; t--) {
      const int64_t at = ((row * q.T + t) * q.H + head) * N;
      read_token<E>(x, q, at, N);
      read_row<E>(gy, grad.y, at, N);
      step_backward<FIXED>(G, states + (t - begin) * N * N, x, u, gy, g, gu, N);
      write_row<E>(grad.r, at, g.r, N);
      write_row<E>(grad.k, at, g.k, N);
      write_row<E>(grad.v, at, g.v, N);
      if (q.constant)
        for (int64_t j = 0; j < N; j++) grad.w[index * N + j] += g.w[j];
      else __builtin_memcpy(grad.w + at, g.w, N * sizeof(float));
      if (!q.reset || !q.reset[row * q.T + t]) continue;
      if (grad.initial)
        for (int64_t i = 0; i < N * N; i++) grad.initial[index * N * N + i] += G[i];
      __builtin_memset(G, 0, N * N * sizeof(float));
    }
  }
  __builtin_memcpy(grad.first + index * N * N, G, N * N * sizeof(float));
}

template <class E>
void any_forward(const Wkv6Problem& q, const Wkv6Outputs& out, int64_t row, int64_t head, float* scratch) {
  if (q.N == 64) forward<E, 64>(q, out, row, head, scratch);
  else forward<E, 0>(q, out, row, head, scratch);
}
template <class E>
void any_backward(const Wkv6Problem& q, const Wkv6Gradients& grad, int64_t row, int64_t head, float* scratch) {
  if (q.N == 64) backward<E, 64>(q, grad, row, head, scratch);
  else backward<E, 0>(q, grad, row, head, scratch);
}

}  // namespace
}  // namespace wkv6_loops

const Wkv6Loops LOOPS(wkv6) = {{wkv6_loops::any_forward<float>, wkv6_loops::any_forward<bf16>},
                               {wkv6_loops::any_backward<float>, wkv6_loops::any_backward<bf16>}};
