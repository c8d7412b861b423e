// WKV7 kernels in the chunk form (cuda/README.md): 16 tokens at a time by matrix products.
//
//   wkv7_chunk_prepare  what each chunk does to any incoming state; all chunks in parallel
//   wkv7_chunk_scan     the state before each chunk: a block per head, a warp per 16 rows (values), which do not
//                       interact; the state stays in registers
//   wkv7_chunk_output   y of each chunk from the state before it; all chunks in parallel
//
// For GPUs with TF32 tensor cores (compute capability 8.0) and heads of 64. No atomics: results are bit-identical.
// Compiled by NVRTC as part of gpu.cu; tests also compile it for the host.
#include "wkv7/wkv7_chunk.h"

#ifdef TENSOR_CORES
namespace wkv7_chunk {

// (I - x)^-1 for strictly lower triangular x, by substitution; a thread has a column.
WKV_FN void put_inverse(Pairs& to, const Pairs& x, int column) {
  float found[L];
  UNROLL for (int i = 0; i < L; i++) {
    found[i] = i == column ? 1 : 0;
    UNROLL for (int j = 0; j < i; j++) found[i] += x[i][j] * found[j];
    to[i][column] = found[i];
  }
}

KERNEL(WKV7_CHUNK_THREADS, 4) wkv7_chunk_prepare(const Wkv7ChunkArgs q) {
  SHARED Tokens scaled[SCALED], values;
  SHARED Pairs pairs[WKV7_PAIRS];
  const Place p = place_of_chunk(q);
  Wkv7Chunk& to = *work(q, p);
  const unsigned starts = starts_of(q, p);
  {
    const int key = p.thread % N, second = p.thread / N;
    float w[L];
    read_decays(w, q, p, starts, key);
    put_scaled(scaled, w, q, p, starts);
    if (second) UNROLL for (int i = 0; i < L; i++) {
      const float lasts = same_document(starts, L - 1, i) ? w[L - 1] : 0;
      to.k[i][key] = scaled[K][i][key] * lasts;
      to.b[i][key] = scaled[B][i][key] * lasts;
    } else {
      put_column(values, q.v, q, p);
      to.decay[key] = w[L - 1];
    }
    if (p.thread == 0) to.own = first_start(starts);
  }
  barrier();
  put_pairs(pairs[p.warp], p, starts, scaled[A], scaled[R], scaled[K], scaled[B]);
  barrier();
  if (p.thread < L) put_inverse(pairs[WKV7_INVERSE], pairs[WKV7_AB], p.thread);
  barrier();
  // Each warp has 16 columns; K~ and B~ are no longer needed
  const int first = p.warp * 16;
  Tokens &sa = scaled[K], &sa_own = scaled[B];
  const auto rows_of = [&](int pair) { return [pair](int i, int j) { return pairs[pair][i][j]; }; };
  const auto columns_of = [&](const Tokens& x) { return [&x, first](int i, int j) { return x[i][first + j]; }; };
  const auto put = [&](Tokens& at, Tile<2>& d) {
    each(d, p, [&](int i, int j, float x) { at[i][first + j] = x; });
  };
  const auto write = [&](float (&at)[L][N], const Tile<2>& d) {
    UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int i = 0; i < 4; i += 2)
      *(Two*)&at[p.g + i * 4][first + 8 * tile + 2 * p.t] = {{d[tile][i], d[tile][i + 1]}};
  };
  Tile<2> d[1];
  clear(d);
  product<L>(d, p, rows_of(WKV7_INVERSE), columns_of(scaled[A]));
  put(sa, d[0]);
  write(to.sa, d[0]);
  clear(d);
  product<L>(d, p, rows_of(WKV7_AK), columns_of(values));
  put(sa_own, d[0]);
  warp_barrier();
  clear(d);
  product<L>(d, p, rows_of(WKV7_INVERSE), columns_of(sa_own));
  warp_barrier();
  put(sa_own, d[0]);
  write(to.sa_own, d[0]);
  warp_barrier();
  each(d[0], p, [&](int i, int j, float& x) { x = scaled[R][i][first + j]; });
  product<L>(d, p, rows_of(WKV7_RB), columns_of(sa));
  write(to.y, d[0]);
  if (q.backward) {
    for (int i = p.thread; i < WKV7_PAIRS * L * L; i += THREADS)
      to.pairs[i / (L * L)][i / L % L][i % L] = pairs[i / (L * L)][i / L % L][i % L];
    return;
  }
  clear(d);
  product<L>(d, p, rows_of(WKV7_RK), columns_of(values));
  product<L>(d, p, rows_of(WKV7_RB), columns_of(sa_own));
  write(to.y_own, d[0]);
}

// ---- scans ----

// 16 rows of a state or of its gradient: tile j has columns 8 j to 8 j + 7.
using State = Tile<N / 8>;

WKV_FN void read_state(State& x, const float* from, const Place& p) {
  UNROLL for (int j = 0; j < N / 8; j++) UNROLL for (int i = 0; i < 4; i += 2) {
    const Two two = from ? *(const Two*)(from + (p.warp * 16 + p.g + i * 4) * N + 8 * j + 2 * p.t) : Two{{0, 0}};
    x[j][i] = two.x[0], x[j][i + 1] = two.x[1];
  }
}
template <bool ADD = false> WKV_FN void write_state(float* to, const State& x, const Place& p) {
  UNROLL for (int j = 0; j < N / 8; j++) UNROLL for (int i = 0; i < 4; i += 2) {
    Two* at = (Two*)(to + (p.warp * 16 + p.g + i * 4) * N + 8 * j + 2 * p.t);
    Two two = {{x[j][i], x[j][i + 1]}};
    if (ADD) two.x[0] += at->x[0], two.x[1] += at->x[1];
    *at = two;
  }
}

// The tensors of a chunk that a scan multiplies its state with. Forward, `inner` is sa, `outer` b and `values`
// V with `others` k; backward, inner is b, outer sa, and values gy with others y: the gradient of
// S -> S diag(decay) + (S inner^T + own) outer + V^T others has the same form.
struct alignas(16) Staged {
  Tokens inner, outer, others;
  float decay[N];
};
struct Fetched {
  static constexpr int VECTORS = L * N / 4 / THREADS;  // of a thread, per matrix
  wkv7::Four<float> inner[VECTORS], outer[VECTORS], others[VECTORS];
  float decay;
  float own_sum[2][4], values[2][4];  // [value, token], as the results of a product
  int own;
};

template <class E>
WKV_FN void fetch_values(float (&to)[2][4], const void* x, const Wkv7ChunkArgs& q, const Place& p) {
  const E* from = (const E*)x + offset(q, p, token(q, p, 0)) + p.warp * 16 + p.g;
  const int left = tokens(q, p);
  UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int e = 0; e < 2; e++) {
    const int i = 8 * tile + 2 * p.t + e;
    const bool exists = i < left;
    UNROLL for (int half = 0; half < 2; half++)
      to[tile][2 * half + e] = exists ? load(from + i * q.H * N + 8 * half) : 0;
  }
}
template <bool REVERSE> WKV_FN void fetch(Fetched& to, const Wkv7ChunkArgs& q, const Place& p) {
  using Four = wkv7::Four<float>;
  const Wkv7Chunk& from = *work(q, p);
  UNROLL for (int i = 0; i < Fetched::VECTORS; i++) {
    const int at = i * THREADS + p.thread;
    to.inner[i] = ((const Four*)(REVERSE ? from.b : from.sa))[at];
    to.outer[i] = ((const Four*)(REVERSE ? from.sa : from.b))[at];
    to.others[i] = ((const Four*)(REVERSE ? from.y : from.k))[at];
  }
  to.decay = from.decay[p.thread % N];
  to.own = from.own;
  UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int i = 0; i < 4; i++) {
    const int value = p.warp * 16 + p.g + i / 2 * 8, t = 8 * tile + 2 * p.t + i % 2;
    to.own_sum[tile][i] = REVERSE ? 0 : from.sa_own[t][value];
  }
  const void* values = REVERSE ? q.gy : q.v;
  if (q.dtype == WKV7_BF16) fetch_values<bf16>(to.values, values, q, p);
  else if (q.dtype == WKV7_FP16) fetch_values<fp16>(to.values, values, q, p);
  else fetch_values<fp32>(to.values, values, q, p);
}
WKV_FN void stage(Staged& to, const Fetched& from, const Place& p) {
  UNROLL for (int i = 0; i < Fetched::VECTORS; i++) {
    const int at = (i * THREADS + p.thread) * 4;
    *(wkv7::Four<float>*)&to.inner[at / N][at % N] = from.inner[i];
    *(wkv7::Four<float>*)&to.outer[at / N][at % N] = from.outer[i];
    *(wkv7::Four<float>*)&to.others[at / N][at % N] = from.others[i];
  }
  if (p.thread < N) to.decay[p.thread] = from.decay;
}

// to = x inner^T, [value, token]
WKV_FN void inner_product(Tile<2>& to, const State& x, const Staged& m, const Place& p) {
  Sum sum[2];
  UNROLL for (int j = 0; j < N / 8; j++) {
    Left left;
    left.set(x[j][0], x[j][2], x[j][1], x[j][3]);
    UNROLL for (int tile = 0; tile < 2; tile++) {
      const Two two = *(const Two*)&m.inner[8 * tile + p.g][8 * j + 2 * p.t];
      Right right;
      right.set(two.x[0], two.x[1]);
      sum[tile].add(left, right);
    }
  }
  UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int i = 0; i < 4; i++) to[tile][i] = sum[tile].at(i);
}
// x = x diag(decay) + s outer + v others, over the tokens from `begin` to `end`
WKV_FN void update(State& x, const float (&s)[2][4], const float (&v)[2][4], const Staged& m, const Place& p, int begin,
                   int end) {
  Left left[4];
  UNROLL for (int tile = 0; tile < 2; tile++) {
    const int t = 8 * tile + 2 * p.t;
    const bool even = t >= begin && t < end, odd = t + 1 >= begin && t + 1 < end;
    left[tile].set(even ? s[tile][0] : 0, even ? s[tile][2] : 0, odd ? s[tile][1] : 0, odd ? s[tile][3] : 0);
    left[2 + tile].set(even ? v[tile][0] : 0, even ? v[tile][2] : 0, odd ? v[tile][1] : 0, odd ? v[tile][3] : 0);
  }
  UNROLL for (int j = 0; j < N / 8; j++) {
    Sum sum;
    UNROLL for (int k = 0; k < 4; k++) {
      const Tokens& from = k < 2 ? m.outer : m.others;
      const int t = k % 2 * 8 + 2 * p.t;
      Right right;
      right.set(from[t][8 * j + p.g], from[t + 1][8 * j + p.g]);
      sum.add(left[k], right);
    }
    const Two decay = *(const Two*)&m.decay[8 * j + 2 * p.t];
    UNROLL for (int i = 0; i < 4; i++) x[j][i] = x[j][i] * decay.x[i % 2] + sum.at(i);
  }
}

template <bool REVERSE> WKV_FN void scan(const Wkv7ChunkArgs& q) {
  SHARED Staged staged[2];
  Place p = place(q, block_number(), 0);
  State x;
  read_state(x, q.from ? q.from + p.index * N * N : nullptr, p);
  const auto at = [&](long long i) { return REVERSE ? q.chunks - 1 - i : i; };
  Fetched next;
  p.chunk = at(0);
  fetch<REVERSE>(next, q, p);
  NO_UNROLL for (long long i = 0; i < q.chunks; i++) {
    Staged& m = staged[i % 2];
    const Fetched now = next;
    stage(m, now, p);
    p.chunk = at(i);
    write_state(REVERSE ? q.gstates + (p.index * q.chunks + p.chunk) * N * N : saved(q, p), x, p);
    barrier();  // one is enough: the other buffer was read before it
    if (i + 1 < q.chunks) {
      p.chunk = at(i + 1);
      fetch<REVERSE>(next, q, p);
    }
    const bool resets = now.own < L;  // the state before token `own` is the initial one
    Tile<2> s;
    NO_UNROLL for (int pass = 0;; pass++) {
      Tile<2> product;
      inner_product(product, x, m, p);
      UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int e = 0; e < 4; e++)
        if (pass == 0 || 8 * tile + 2 * p.t + e % 2 >= now.own) s[tile][e] = product[tile][e] + now.own_sum[tile][e];
      if (REVERSE || !resets || pass == 1) break;
      read_state(x, initial(q, p), p);
    }
    NO_UNROLL for (int pass = REVERSE && resets ? 0 : 1; pass < 2; pass++) {
      update(x, s, now.values, m, p, pass == 0 ? now.own : 0, REVERSE && pass == 1 ? now.own : L);
      if (pass == 0) {  // the gradient of the initial state
        if (q.ginitial) write_state<true>(q.ginitial + p.index * N * N, x, p);
        read_state(x, nullptr, p);
      }
    }
  }
  write_state(q.to + p.index * N * N, x, p);
}

KERNEL(WKV7_CHUNK_THREADS, 2) wkv7_chunk_scan(const Wkv7ChunkArgs q) { scan<false>(q); }

// ---- y ----

KERNEL(WKV7_CHUNK_THREADS, 4) wkv7_chunk_output(const Wkv7ChunkArgs q) {
  const Place p = place_of_chunk(q);
  const Wkv7Chunk& from = *work(q, p);
  const int first = p.warp * 16;
  Tile<2> d[1];
  each(d[0], p, [&](int i, int j, float& x) { x = from.y_own[i][first + j]; });
  state_products(d, p, from.own, saved(q, p), initial(q, p), [&](int, int i, int key) { return from.y[i][key]; },
                 [&](const float* state, int key, int j) { return state[(first + j) * N + key]; });
  write_values(q.y, d[0], q, p);
}

}  // namespace wkv7_chunk
#endif
