// What the WKV7 kernels in the chunk form share: products of small matrices on tensor cores, and the
// tokens of a chunk, scaled by their decays (wkv7_chunk.cu, wkv7_chunk_gradient.cu).
#pragma once
#include "common/device.h"
#include "wkv7/wkv7_chunk_args.h"
#include "wkv7/wkv7_tile.h"

#ifdef TENSOR_CORES
namespace wkv7_chunk {

// A smaller log-decay makes its chunk NaN: its inverse, over 16 tokens, would leave fp32's precision.
static constexpr float LEAST = -4;
static constexpr int L = WKV7_CHUNK, N = WKV7_CHUNK_N, THREADS = WKV7_CHUNK_THREADS;
static constexpr int LINE = N + 8, PAIR_LINE = L + 4;  // padded: fewer bank conflicts
using Tokens = float[L][LINE];
using Pairs = float[L][PAIR_LINE];
struct alignas(8) Two { float x[2]; };

struct Place {
  long long index, batch, head, chunk;  // index = batch * H + head; chunk: of this launch
  int thread, warp, g, t;               // g, t: as in mma_tf32
};
WKV_FN Place place(const Wkv7ChunkArgs& q, unsigned index, unsigned chunk) {
  Place p;
  p.index = index, p.batch = index / (unsigned)q.H, p.head = index % (unsigned)q.H, p.chunk = chunk;
  p.thread = (int)thread_number();
  p.warp = p.thread / 32, p.g = p.thread % 32 / 4, p.t = p.thread % 4;
  return p;
}
WKV_FN Place place_of_chunk(const Wkv7ChunkArgs& q) {
  return place(q, block_number() / (unsigned)q.chunks, block_number() % (unsigned)q.chunks);
}
WKV_FN long long token(const Wkv7ChunkArgs& q, const Place& p, int i) { return (q.begin + p.chunk) * L + i; }
// Tokens of this chunk, at most L.
WKV_FN int tokens(const Wkv7ChunkArgs& q, const Place& p) {
  const long long left = q.T - token(q, p, 0);
  return left < L ? (int)left : L;
}
WKV_FN long long offset(const Wkv7ChunkArgs& q, const Place& p, long long t) {
  return ((p.batch * q.T + t) * q.H + p.head) * N;
}
WKV_FN Wkv7Chunk* work(const Wkv7ChunkArgs& q, const Place& p) { return q.work + p.index * q.chunks + p.chunk; }
WKV_FN float* saved(const Wkv7ChunkArgs& q, const Place& p) {
  return q.saved + (p.index * q.all_chunks + q.begin + p.chunk) * N * N;
}
WKV_FN const float* initial(const Wkv7ChunkArgs& q, const Place& p) {
  return q.initial ? q.initial + p.index * N * N : nullptr;
}

// ---- products: three of TF32 give nearly fp32's precision ----

// An operand in two parts: x rounded to TF32, and the rest, which the tensor cores truncate. A NaN is at least in `low`.
template <int COUNT> struct Operand {
  unsigned high[COUNT], low[COUNT];
  WKV_MEMBER void set(const float (&x)[COUNT]) {
    UNROLL for (int i = 0; i < COUNT; i++) {
      high[i] = (as_bits(x[i]) + 0x1000u) & 0xffffe000u;
      low[i] = as_bits(x[i] - as_float(high[i]));
    }
  }
};
// 8 columns of the left operand: x[g][k], x[g + 8][k], x[g][k + 1], x[g + 8][k + 1] with k = 2 t. (The order of k
// does not matter if both operands have the same: with this one a thread's result, [g][2 t], is an operand.)
struct Left : Operand<4> {
  WKV_MEMBER void set(float x0, float x1, float x2, float x3) { Operand<4>::set({x0, x1, x2, x3}); }
};
struct Right : Operand<2> {
  WKV_MEMBER void set(float x0, float x1) { Operand<2>::set({x0, x1}); }
};
// A sum of products [16, 8]: d[g][2 t], d[g][2 t + 1], d[g + 8][2 t], d[g + 8][2 t + 1]. Tensor cores round sums
// towards zero, so the small terms are summed apart, and sums that last are formed elsewhere.
struct Sum {
  float high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
  WKV_MEMBER void add(const Left& x, const Right& y) {
    mma_tf32(low, x.low, y.high);
    mma_tf32(low, x.high, y.low);
    mma_tf32(high, x.high, y.high);
  }
  WKV_MEMBER float at(int i) const { return high[i] + low[i]; }
};
template <int TILES> using Tile = float[TILES][4];

// d[m] += x(m, i, k) y(k, j) summed over k < DEPTH, for MATRICES left operands of 16 rows i, and 8 TILES columns j.
template <int DEPTH, int MATRICES, int TILES, class X, class Y>
WKV_FN void products(Tile<TILES> (&d)[MATRICES], const Place& p, const X& x, const Y& y) {
  Sum sum[MATRICES][TILES];
  _Pragma("unroll 1") for (int k0 = 0; k0 < DEPTH; k0 += 8) {
    const int k = k0 + 2 * p.t;
    Left left[MATRICES];
    UNROLL for (int m = 0; m < MATRICES; m++)
      left[m].set(x(m, p.g, k), x(m, p.g + 8, k), x(m, p.g, k + 1), x(m, p.g + 8, k + 1));
    UNROLL for (int tile = 0; tile < TILES; tile++) {
      Right right;
      right.set(y(k, 8 * tile + p.g), y(k + 1, 8 * tile + p.g));
      UNROLL for (int m = 0; m < MATRICES; m++) sum[m][tile].add(left[m], right);
    }
  }
  UNROLL for (int m = 0; m < MATRICES; m++)
    UNROLL for (int tile = 0; tile < TILES; tile++)
      UNROLL for (int i = 0; i < 4; i++) d[m][tile][i] += sum[m][tile].at(i);
}
template <int DEPTH, int TILES, class X, class Y>
WKV_FN void product(Tile<TILES> (&d)[1], const Place& p, const X& x, const Y& y) {
  products<DEPTH, 1>(d, p, [&](int, int i, int k) { return x(i, k); }, y);
}
template <int MATRICES, int TILES> WKV_FN void clear(Tile<TILES> (&d)[MATRICES]) {
  UNROLL for (int m = 0; m < MATRICES; m++)
    UNROLL for (int tile = 0; tile < TILES; tile++) UNROLL for (int i = 0; i < 4; i++) d[m][tile][i] = 0;
}
// Calls f(row, column, x) for the elements of a result.
template <int TILES, class F> WKV_FN void each(Tile<TILES>& d, const Place& p, const F& f) {
  UNROLL for (int tile = 0; tile < TILES; tile++)
    UNROLL for (int i = 0; i < 4; i++) f(p.g + i / 2 * 8, 8 * tile + 2 * p.t + i % 2, d[tile][i]);
}

// d += products with the incoming state: x(m, i, k) y(state, k, j), where rows i from `own` on, whose
// document starts in this chunk, take the initial state instead.
template <int MATRICES, int TILES, class X, class Y>
WKV_FN void state_products(Tile<TILES> (&d)[MATRICES], const Place& p, int own, const float* state,
                           const float* initial, const X& x, const Y& y) {
  Tile<TILES> part[MATRICES];
  clear(part);
  products<N>(part, p, x, [&](int k, int j) { return y(state, k, j); });
  if (own < L) {
    Tile<TILES> other[MATRICES];
    clear(other);
    if (initial) products<N>(other, p, x, [&](int k, int j) { return y(initial, k, j); });
    UNROLL for (int m = 0; m < MATRICES; m++)
      UNROLL for (int tile = 0; tile < TILES; tile++)
        UNROLL for (int i = 0; i < 4; i++) if (p.g + i / 2 * 8 >= own) part[m][tile][i] = other[m][tile][i];
  }
  UNROLL for (int m = 0; m < MATRICES; m++)
    UNROLL for (int tile = 0; tile < TILES; tile++)
      UNROLL for (int i = 0; i < 4; i++) d[m][tile][i] += part[m][tile][i];
}

// ---- the tokens of a chunk ----

// A bit for each token at which a document starts.
WKV_FN unsigned starts_of(const Wkv7ChunkArgs& q, const Place& p) {
  unsigned starts = 0;
  const int left = tokens(q, p);
  if (q.reset) UNROLL for (int i = 0; i < L; i++)
    if (i < left && q.reset[p.batch * q.T + token(q, p, i)]) starts |= 1u << i;
  return starts;
}
// Whether tokens j <= i are of the same document.
WKV_FN bool same_document(unsigned starts, int i, int j) { return !(starts & ((2u << i) - (2u << j))); }
WKV_FN int first_start(unsigned starts) {
  int first = L;
  UNROLL for (int i = L - 1; i >= 0; i--) if (starts >> i & 1) first = i;
  return first;
}

// A column of this chunk's tokens; zeros after the last token.
template <class E>
WKV_FN void read_column(float (&to)[L], const void* x, const Wkv7ChunkArgs& q, const Place& p, int column) {
  const int left = tokens(q, p);
  const long long stride = q.H * N;
  const E* from = (const E*)x + offset(q, p, token(q, p, 0)) + column;
  UNROLL for (int i = 0; i < L; i++) to[i] = i < left ? load(from + i * stride) : 0;
}
WKV_FN void read_column(float (&to)[L], const void* x, const Wkv7ChunkArgs& q, const Place& p, int column) {
  if (q.dtype == WKV7_BF16) read_column<bf16>(to, x, q, p, column);
  else if (q.dtype == WKV7_FP16) read_column<fp16>(to, x, q, p, column);
  else read_column<fp32>(to, x, q, p, column);
}
template <class E>
WKV_FN void write_column(void* x, const float (&from)[L], const Wkv7ChunkArgs& q, const Place& p, int column) {
  const int left = tokens(q, p);
  const long long stride = q.H * N;
  E* to = (E*)x + offset(q, p, token(q, p, 0)) + column;
  UNROLL for (int i = 0; i < L; i++) if (i < left) store(to + i * stride, from[i]);
}
WKV_FN void write_column(void* x, const float (&from)[L], const Wkv7ChunkArgs& q, const Place& p, int column) {
  if (q.dtype == WKV7_BF16) write_column<bf16>(x, from, q, p, column);
  else if (q.dtype == WKV7_FP16) write_column<fp16>(x, from, q, p, column);
  else write_column<fp32>(x, from, q, p, column);
}
// Writes 16 values of each token, as a warp has them.
template <class E>
WKV_FN void write_values(void* x, const Tile<2>& from, const Wkv7ChunkArgs& q, const Place& p) {
  E* to = (E*)x + offset(q, p, token(q, p, 0)) + p.warp * 16 + 2 * p.t;
  const int left = tokens(q, p);
  UNROLL for (int i = 0; i < 2; i++) {
    const int row = p.g + 8 * i;
    if (row < left) UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int e = 0; e < 2; e++)
      store(to + row * q.H * N + 8 * tile + e, from[tile][2 * i + e]);
  }
}
WKV_FN void write_values(void* x, const Tile<2>& from, const Wkv7ChunkArgs& q, const Place& p) {
  if (q.dtype == WKV7_BF16) write_values<bf16>(x, from, q, p);
  else if (q.dtype == WKV7_FP16) write_values<fp16>(x, from, q, p);
  else write_values<fp32>(x, from, q, p);
}

// The decays of a key from the start of its document, or of the chunk: to[i] includes token i. NaN from a log-decay
// that is too small on.
WKV_FN void read_decays(float (&to)[L], const Wkv7ChunkArgs& q, const Place& p, unsigned starts, int key) {
  read_column<fp32>(to, q.w, q, p, key);
  float product = 1;
  UNROLL for (int i = 0; i < L; i++) {
    const float decay = to[i] >= LEAST ? wkv_exp(to[i]) : as_float(0x7fc00000);
    to[i] = product = (starts >> i & 1 ? 1 : product) * decay;
  }
}
WKV_FN float before(const float (&decays)[L], unsigned starts, int i) {
  return i == 0 || (starts >> i & 1) ? 1 : decays[i > 0 ? i - 1 : 0];
}

// The matrices A~ = a W_before, R~ = r W, K~ = k / W, B~ = b / W, one row a token. The first half of the threads has
// A~ and R~, the other one K~ and B~.
enum { A, R, K, B, SCALED };
WKV_FN void put_scaled(Tokens (&to)[SCALED], const float (&decays)[L], const Wkv7ChunkArgs& q, const Place& p,
                       unsigned starts) {
  const int key = p.thread % N, second = p.thread / N;
  float x[L], y[L];
  read_column(x, second ? q.k : q.a, q, p, key);
  read_column(y, second ? q.b : q.r, q, p, key);
  UNROLL for (int i = 0; i < L; i++) {
    const float inverse = 1 / decays[i];
    to[second ? K : A][i][key] = x[i] * (second ? inverse : before(decays, starts, i));
    to[second ? B : R][i][key] = y[i] * (second ? inverse : decays[i]);
  }
}
WKV_FN void put_column(Tokens& to, const void* x, const Wkv7ChunkArgs& q, const Place& p) {
  const int column = p.thread % N;
  float values[L];
  read_column(values, x, q, p, column);
  UNROLL for (int i = 0; i < L; i++) to[i][column] = values[i];
}

// One of the four matrices [16, 16] of products of tokens, by a warp: rows a, a, r, r and columns b, k, k, b. Only
// pairs of one document, the column before the row, or with a row r the same.
WKV_FN void put_pairs(Pairs& to, const Place& p, unsigned starts, const Tokens& a, const Tokens& r, const Tokens& k,
                      const Tokens& b) {
  const Tokens& row = p.warp < 2 ? a : r;
  const Tokens& column = p.warp == WKV7_AB || p.warp == WKV7_RB ? b : k;
  Tile<2> d[1];
  clear(d);
  product<N>(d, p, [&](int i, int key) { return row[i][key]; }, [&](int key, int j) { return column[j][key]; });
  each(d[0], p, [&](int i, int j, float x) {
    const bool counts = j < i + (p.warp >= 2) && same_document(starts, i, j);
    to[i][j] = counts ? x : 0;
  });
}

}  // namespace wkv7_chunk
#endif
