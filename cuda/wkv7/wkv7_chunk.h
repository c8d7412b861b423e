// The products of 16 tokens of WKV7 (the WY form), by a block with a head of 64; formulas:
// wkv7_chunks.cu.
#pragma once
#include "common/matrix.h"
#include "wkv7/wkv7_args.h"

namespace wkv7_chunks {

enum { N = 64, L = WKV7_INTERVAL, WARPS = WKV7_CHUNK_WARPS, COLUMNS = N / WARPS, TILES = COLUMNS / 8 };
enum { STRIDE = N + 4, SMALL = L + 4 };  // of rows; so that the threads of a warp use different banks

struct Memory {
  float R[L][STRIDE], A[L][STRIDE], K[L][STRIDE], B[L][STRIDE], decay[L][STRIDE];  // [token][key]; decay: e^c
  float V[L][STRIDE], gY[L][STRIDE], U[L][STRIDE], Z[L][STRIDE];                   // [token][value]
  float AB[L][SMALL], AK[L][SMALL], RK[L][SMALL], RB[L][SMALL];                    // [token][token]
  float gAB[L][SMALL], gAK[L][SMALL], gRK[L][SMALL], gRB[L][SMALL];
  float of_D[N], of_S[2][N];  // gradient of D, times D: from gK and gB; from S, in two halves
  float S[N][STRIDE], G[N][STRIDE];  // [value][key]; not every kernel has both
};
static_assert(sizeof(Memory) == WKV7_GRADIENT_MEMORY, "");
static_assert(sizeof(float[N][STRIDE]) == WKV7_GRADIENT_MEMORY - WKV7_OUTPUT_MEMORY, "");

// d [16, 8 TILES] += a b: a(row, k) and b(k, column) give elements.
template <int DEPTH, int COUNT, class FA, class FB>
WKV_FN void multiply(float (&d)[COUNT][4], const FA& a, const FB& b) {
  const int g = thread_number() % 32 / 4, t = thread_number() % 4;
  _Pragma("unroll 2") for (int k = t; k < DEPTH; k += 8) {
    const Split x[4] = {split(a(g, k)), split(a(g + 8, k)), split(a(g, k + 4)), split(a(g + 8, k + 4))};
    UNROLL for (int i = 0; i < COUNT; i++) {
      const Split y[2] = {split(b(k, 8 * i + g)), split(b(k + 4, 8 * i + g))};
      multiply_add(d[i], x, y);
    }
  }
}
// f(row, column, element) for this thread's elements of d.
template <int COUNT, class F> WKV_FN void each(float (&d)[COUNT][4], const F& f) {
  const int g = thread_number() % 32 / 4, t = thread_number() % 4;
  UNROLL for (int i = 0; i < COUNT; i++)
    UNROLL for (int e = 0; e < 4; e++) f(g + e / 2 * 8, 8 * i + 2 * t + e % 2, d[i][e]);
}

// Tokens [begin, end) of one document, between two saved states.
struct Span { long long begin, end; };

template <class E> struct Kernel {
  const Wkv7Args& q;
  Memory& m;
  long long index, row, head;      // index = row * H + head
  int thread, warp, column, half;  // column: one of N; half: of the rows
  int first;                       // of this warp's columns

  WKV_MEMBER long long at(long long t) const { return ((row * q.T + t) * q.H + head) * N; }

  // State number i of [i][N][N]; zeros if null.
  WKV_MEMBER void read_state(float (&to)[N][STRIDE], const float* from, long long i) const {
    for (int row = half; row < N; row += 2) to[row][column] = from ? from[(i * N + row) * N + column] : 0;
  }
  // G into state number i of `to`.
  template <bool ADD> WKV_MEMBER void write_gradient(float* to, long long i) const {
    for (int row = half; row < N; row += 2) {
      float* at = to + (i * N + row) * N + column;
      *at = ADD ? *at + m.G[row][column] : m.G[row][column];
    }
  }
  WKV_MEMBER void read_tokens(const Span& span, bool backward) const {
    float decay = 1;
    const long long begin = at(span.begin) + column, step = q.H * N;
    const int count = (int)(span.end - span.begin);
    if (half)
      UNROLL for (int i = 0; i < L / 2; i++) if (i < count) decay *= wkv_exp(q.w[begin + i * step]);
    const auto read = [&](const void* x, int i) { return i < count ? load((const E*)x + begin + i * step) : 0.0f; };
    UNROLL for (int n = 0; n < L / 2; n++) {
      const int i = half * (L / 2) + n;
      const float before = decay;
      if (i < count) decay *= wkv_exp(q.w[begin + i * step]);
      const float inverse = 1 / decay;
      m.R[i][column] = read(q.r, i) * decay;
      m.A[i][column] = read(q.a, i) * before;
      m.K[i][column] = read(q.k, i) * inverse;
      m.B[i][column] = read(q.b, i) * inverse;
      m.V[i][column] = read(q.v, i);
      if (backward) m.gY[i][column] = read(q.gy, i);
      m.decay[i][column] = decay;
    }
  }

  // Products of tokens with tokens: one per warp.
  WKV_MEMBER void products(float (&to)[L][SMALL], const float (&x)[L][STRIDE], const float (&y)[L][STRIDE],
                           bool diagonal) const {
    float d[L / 8][4] = {};
    multiply<N>(d, [&](int i, int k) { return x[i][k]; }, [&](int k, int j) { return y[j][k]; });
    each(d, [&](int i, int j, float value) { to[i][j] = j < i || (diagonal && j == i) ? value : 0; });
  }

  WKV_MEMBER void products_of_inputs() const {
    if (warp == 0) products(m.AB, m.A, m.B, false);
    if (warp == 1) products(m.AK, m.A, m.K, false);
    if (warp == 2) products(m.RK, m.R, m.K, true);
    if (warp == 3) products(m.RB, m.R, m.B, true);
  }

  // The right-hand side of U, in this warp's values.
  WKV_MEMBER void right_side() const {
    float U[TILES][4] = {};
    multiply<N>(U, [&](int i, int k) { return m.A[i][k]; }, [&](int k, int j) { return m.S[first + j][k]; });
    multiply<L>(U, [&](int i, int k) { return m.AK[i][k]; }, [&](int k, int j) { return m.V[k][first + j]; });
    each(U, [&](int i, int j, float value) { m.U[i][first + j] = value; });
  }
  // That of Z, and gV without the part of Z; in this warp's values.
  WKV_MEMBER void right_side_of_gradient(float (&gV)[TILES][4]) const {
    float Z[TILES][4] = {};
    const float(&D)[STRIDE] = m.decay[L - 1];
    multiply<N>(Z, [&](int i, int k) { return m.B[i][k] * D[k]; }, [&](int k, int j) { return m.G[first + j][k]; });
    multiply<L>(Z, [&](int i, int k) { return m.RB[k][i]; }, [&](int k, int j) { return m.gY[k][first + j]; });
    multiply<N>(gV, [&](int i, int k) { return m.K[i][k] * D[k]; }, [&](int k, int j) { return m.G[first + j][k]; });
    multiply<L>(gV, [&](int i, int k) { return m.RK[k][i]; }, [&](int k, int j) { return m.gY[k][first + j]; });
    each(Z, [&](int i, int j, float value) { m.Z[i][first + j] = value; });
  }
  // x <- (1 - AB)^-1 x by substitution, in this thread's column.
  WKV_MEMBER void solve(float (&to)[L][STRIDE]) const {
    float x[L];
    UNROLL for (int i = 0; i < L; i++) {
      x[i] = to[i][column];
      UNROLL for (int j = 0; j < i; j++) x[i] += m.AB[i][j] * x[j];
      to[i][column] = x[i];
    }
  }
  // The same with the transpose of AB.
  WKV_MEMBER void solve_transposed(float (&to)[L][STRIDE]) const {
    float x[L];
    UNROLL for (int i = L - 1; i >= 0; i--) {
      x[i] = to[i][column];
      UNROLL for (int j = L - 1; j > i; j--) x[i] += m.AB[j][i] * x[j];
      to[i][column] = x[i];
    }
  }
  // Half of the sum over values of G S.
  WKV_MEMBER void gradient_through_state() const {
    float sum = 0;
    for (int i = half * (N / 2); i < (half + 1) * (N / 2); i++) sum += m.G[i][column] * m.S[i][column];
    m.of_S[half][column] = sum;
  }

  template <class T> WKV_MEMBER void write(T* to, const Span& span, int i, int j, float x) const {
    if (i < span.end - span.begin) store(to + at(span.begin + i) + j, x);
  }
  // gR, gA, gK and gB in this warp's keys; of those of c, K and B of the memory take what gw needs.
  WKV_MEMBER void write_keys(const Span& span) const {
    float gR[TILES][4] = {}, gA[TILES][4] = {}, gK[TILES][4] = {}, gB[TILES][4] = {}, VG[TILES][4] = {},
          UG[TILES][4] = {};
    const auto K = [&](int k, int j) { return m.K[k][first + j]; };
    const auto B = [&](int k, int j) { return m.B[k][first + j]; };
    const auto R = [&](int k, int j) { return m.R[k][first + j]; };
    const auto A = [&](int k, int j) { return m.A[k][first + j]; };
    const auto S = [&](int k, int j) { return m.S[k][first + j]; };
    const auto G = [&](int k, int j) { return m.G[k][first + j]; };
    multiply<N>(gR, [&](int i, int k) { return m.gY[i][k]; }, S);
    multiply<L>(gR, [&](int i, int k) { return m.gRK[i][k]; }, K);
    multiply<L>(gR, [&](int i, int k) { return m.gRB[i][k]; }, B);
    multiply<N>(gA, [&](int i, int k) { return m.Z[i][k]; }, S);
    multiply<L>(gA, [&](int i, int k) { return m.gAK[i][k]; }, K);
    multiply<L>(gA, [&](int i, int k) { return m.gAB[i][k]; }, B);
    multiply<L>(gK, [&](int i, int k) { return m.gRK[k][i]; }, R);
    multiply<L>(gK, [&](int i, int k) { return m.gAK[k][i]; }, A);
    multiply<N>(VG, [&](int i, int k) { return m.V[i][k]; }, G);
    multiply<L>(gB, [&](int i, int k) { return m.gRB[k][i]; }, R);
    multiply<L>(gB, [&](int i, int k) { return m.gAB[k][i]; }, A);
    multiply<N>(UG, [&](int i, int k) { return m.U[i][k]; }, G);
    warp_barrier();  // the warp has read its columns of K and B
    float of_D[TILES][2] = {};
    const int g = thread % 32 / 4, t = thread % 4;
    UNROLL for (int tile = 0; tile < TILES; tile++)
      UNROLL for (int e = 0; e < 4; e++) {
        const int i = g + e / 2 * 8, j = first + 8 * tile + 2 * t + e % 2;
        const float decay = m.decay[i][j], before = i ? m.decay[i - 1][j] : 1, D = m.decay[L - 1][j];
        const float k = m.K[i][j], b = m.B[i][j];
        const float through_k = VG[tile][e] * D, through_b = UG[tile][e] * D;
        const float of_k = gK[tile][e] + through_k, of_b = gB[tile][e] + through_b;
        const float of_before = gA[tile][e] * m.A[i][j];
        write((E*)q.gr, span, i, j, gR[tile][e] * decay);
        write((E*)q.ga, span, i, j, gA[tile][e] * before);
        write((E*)q.gk, span, i, j, of_k / decay);
        write((E*)q.gb, span, i, j, of_b / decay);
        of_D[tile][e % 2] += through_k * k + through_b * b;
        m.K[i][j] = gR[tile][e] * m.R[i][j] - of_k * k - of_b * b + of_before;
        m.B[i][j] = of_before;
      }
    UNROLL for (int tile = 0; tile < TILES; tile++)
      UNROLL for (int e = 0; e < 2; e++) {
        float sum = of_D[tile][e];
        UNROLL for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (g == 0) m.of_D[first + 8 * tile + 2 * t + e] = sum;
      }
  }
  // G of the state before the tokens, in this warp's rows.
  WKV_MEMBER void update() const {
    static_assert(N / WARPS == 16, "a warp has 16 rows of G");
    float d[N / 8][4];
    each(d, [&](int i, int j, float& value) { value = m.G[first + i][j] * m.decay[L - 1][j]; });
    multiply<L>(d, [&](int i, int k) { return m.gY[k][first + i]; }, [&](int k, int j) { return m.R[k][j]; });
    multiply<L>(d, [&](int i, int k) { return m.Z[k][first + i]; }, [&](int k, int j) { return m.A[k][j]; });
    each(d, [&](int i, int j, float value) { m.G[first + i][j] = value; });
  }
  // gw of half of the tokens, from the gradients of every c
  WKV_MEMBER void write_decays(const Span& span) const {
    float sum = m.of_D[column] + m.decay[L - 1][column] * (m.of_S[0][column] + m.of_S[1][column]);
    if (!half)
      UNROLL for (int i = L - 1; i >= L / 2; i--) sum += m.K[i][column];
    UNROLL for (int n = L / 2 - 1; n >= 0; n--) {
      const int i = half * (L / 2) + n;
      sum += m.K[i][column];
      if (i < span.end - span.begin) q.gw[at(span.begin + i) + column] = sum - m.B[i][column];
    }
  }

  // y of the tokens of a span, from the state `states[i]`.
  WKV_MEMBER void output(const Span& span, const float* states, long long i) const {
    barrier();  // the memory is free
    read_tokens(span, false);
    read_state(m.S, states, i);
    barrier();
    products_of_inputs();
    barrier();
    right_side();
    barrier();
    if (!half) solve(m.U);
    barrier();
    float y[TILES][4] = {};
    multiply<N>(y, [&](int i, int k) { return m.R[i][k]; }, [&](int k, int j) { return m.S[first + j][k]; });
    multiply<L>(y, [&](int i, int k) { return m.RK[i][k]; }, [&](int k, int j) { return m.V[k][first + j]; });
    multiply<L>(y, [&](int i, int k) { return m.RB[i][k]; }, [&](int k, int j) { return m.U[k][first + j]; });
    each(y, [&](int i, int j, float value) { write((E*)q.y, span, i, first + j, value); });
  }
  // Gradients of the tokens of a span, from the state `states[i]`; G of the state before them if `going_on`.
  WKV_MEMBER void gradient(const Span& span, const float* states, long long i, bool going_on) const {
    barrier();  // the memory is free
    read_tokens(span, true);
    read_state(m.S, states, i);
    barrier();
    products_of_inputs();
    barrier();
    float gV[TILES][4] = {};
    right_side();
    right_side_of_gradient(gV);
    gradient_through_state();
    barrier();
    if (half) solve_transposed(m.Z);
    else solve(m.U);
    barrier();
    multiply<L>(gV, [&](int i, int k) { return m.AK[k][i]; }, [&](int k, int j) { return m.Z[k][first + j]; });
    each(gV, [&](int i, int j, float value) { write((E*)q.gv, span, i, first + j, value); });
    if (warp == 0) products(m.gAB, m.Z, m.U, false);
    if (warp == 1) products(m.gAK, m.Z, m.V, false);
    if (warp == 2) products(m.gRK, m.gY, m.V, true);
    if (warp == 3) products(m.gRB, m.gY, m.U, true);
    barrier();
    write_keys(span);
    barrier();
    if (going_on) update();
    write_decays(span);
  }
};

template <class E> WKV_FN Kernel<E> kernel_of(const Wkv7Args& q, float* memory, long long index) {
  const int thread = thread_number(), warp = thread / 32;
  return {q,    *(Memory*)memory, index,     index / q.H,   index % q.H, thread,
          warp, thread % N,       thread / N, warp * COLUMNS};
}
// Where a document starts in this batch row; null: nowhere.
WKV_FN const unsigned char* starts_of(const Wkv7Args& q, long long index) {
  return q.reset ? q.reset + index / q.H * q.T : nullptr;
}
WKV_FN long long chunks_of(const Wkv7Args& q) { return (q.T + L - 1) / L; }
WKV_FN Span chunk_span(const Wkv7Args& q, long long chunk) {
  return {chunk * L, chunk * L + L < q.T ? chunk * L + L : q.T};
}
// The last document of [begin, end).
WKV_FN long long document(const unsigned char* starts, long long begin, long long end) {
  if (!starts) return begin;
  long long t = end - 1;
  while (t > begin && !starts[t]) t--;
  return t;
}

}  // namespace wkv7_chunks
