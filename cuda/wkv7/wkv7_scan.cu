// WKV7 with few heads: every chunk of 16 tokens at once, but for a scan over the states between them.
//
// In both directions, a chunk maps the state X before it, S or backward in time G, to
//
//     X' = X D + Y^T R + Z^T A        with Z = Z0 + Q X^T
//
// with rows of tokens. Forward, in the terms of wkv7_chunks.cu: Z = U, Q = (1 - AB)^-1 A,
// Z0 = (1 - AB)^-1 AK V, Y = V, R = K D, A = B D. Backward: Z = Z, Q = (1 - AB^T)^-1 B D,
// Z0 = (1 - AB^T)^-1 RB^T gY, Y = gY. First wkv7_prepare_* computes these for every chunk, then
// wkv7_scan_* the state before every chunk, with 16 rows of X in the registers of a warp, and
// wkv7_parallel_* the outputs or gradients of every chunk from it. If a document starts in a chunk,
// X' depends on the tokens after the last start only, backward on those before the first, and X is
// the initial state, backward 0.
#include "wkv7/wkv7_chunk.h"

namespace wkv7_chunks {

// A chunk's part of q.work.
struct Map {
  float Q[L][N], Z0[L][N], A[L][N], R[L][N], Y[L][N], D[N], fresh[N];
};
static_assert(sizeof(Map) == sizeof(float) * WKV7_MAP_FLOATS, "");

template <class E, bool OUTPUT> WKV_FN void prepare(const Wkv7Args& q) {
  SHARED_FLOATS(memory);
  const long long block = block_number(), chunk = block % chunks_of(q);
  const Kernel<E> kernel = kernel_of<E>(q, memory, block / chunks_of(q));
  Memory& m = kernel.m;
  const unsigned char* starts = starts_of(q, kernel.index);
  Span span = chunk_span(q, chunk);
  bool fresh = false;
  if (OUTPUT) {
    span.begin = document(starts, span.begin, span.end);
    fresh = starts && starts[span.begin];
  } else if (starts) {
    for (long long t = span.end - 1; t >= span.begin; t--)
      if (starts[t]) span.end = t, fresh = true;
  }
  kernel.read_tokens(span, !OUTPUT);
  barrier();
  kernel.products_of_inputs();
  barrier();
  const float(&D)[STRIDE] = m.decay[L - 1];
  const int first = kernel.first, column = kernel.column;
  float right[TILES][4] = {};
  if (OUTPUT)
    multiply<L>(right, [&](int i, int k) { return m.AK[i][k]; }, [&](int k, int j) { return m.V[k][first + j]; });
  else
    multiply<L>(right, [&](int i, int k) { return m.RB[k][i]; }, [&](int k, int j) { return m.gY[k][first + j]; });
  each(right, [&](int i, int j, float value) { m.U[i][first + j] = value; });
  for (int i = kernel.half; i < L; i += 2) m.Z[i][column] = OUTPUT ? m.A[i][column] : m.B[i][column] * D[column];
  barrier();
  float(&unknown)[L][STRIDE] = kernel.half ? m.Z : m.U;
  if (OUTPUT) kernel.solve(unknown);
  else kernel.solve_transposed(unknown);
  barrier();
  Map& map = ((Map*)q.work)[block];
  for (int i = kernel.half; i < L; i += 2) {
    map.Q[i][column] = m.Z[i][column];
    map.Z0[i][column] = m.U[i][column];
    map.A[i][column] = OUTPUT ? m.B[i][column] * D[column] : m.A[i][column];
    map.R[i][column] = OUTPUT ? m.K[i][column] * D[column] : m.R[i][column];
    map.Y[i][column] = OUTPUT ? m.V[i][column] : m.gY[i][column];
  }
  if (kernel.half) map.fresh[column] = fresh;
  else map.D[column] = D[column];
}

// Rows of 16 values and columns of 8 keys are this thread's elements of a product (matrix.h), which
// are also its elements of an operand [16, 8], in another order of columns:
WKV_FN void operand(Split (&to)[4], const float (&from)[4]) {
  UNROLL for (int e = 0; e < 4; e++) to[e] = split(from[e % 2 * 2 + e / 2]);
}

template <bool OUTPUT> WKV_FN void scan(const Wkv7Args& q) {
  enum { ROW = N + 8, VECTORS = WKV7_MAP_FLOATS / 4 / (32 * WARPS) + 1 };  // ROW: other banks for each thread
  SHARED float now[2][5][L][ROW], D[2][2 * N];  // D, then fresh
  const long long index = block_number(), chunks = chunks_of(q);
  const int thread = thread_number(), first = thread / 32 * 16, g = thread % 32 / 4, t = thread % 4;
  const Map* maps = (const Map*)q.work + index * chunks;
  float X[N / 8][4];
  // each element of X: f(row, column, element)
  const auto from = [&](const float* states) {
    each(X, [&](int i, int j, float& x) { x = states ? states[(index * N + first + i) * N + j] : 0; });
  };
  from(OUTPUT ? q.first : q.glast);
  float four[VECTORS][4];
  const auto fetch = [&](long long chunk) {
    const float* map = (const float*)(maps + chunk);
    UNROLL for (int n = 0; n < VECTORS; n++) {
      const int at = (n * 32 * WARPS + thread) * 4;
      if (at < WKV7_MAP_FLOATS)
        UNROLL for (int e = 0; e < 4; e++) four[n][e] = map[at + e];
    }
  };
  fetch(OUTPUT ? 0 : chunks - 1);
  for (long long n = 0; n < chunks; n++) {
    const long long chunk = OUTPUT ? n : chunks - 1 - n;
    const int buffer = n % 2;
    UNROLL for (int i = 0; i < VECTORS; i++) {
      const int at = (i * 32 * WARPS + thread) * 4;
      if (at >= WKV7_MAP_FLOATS) continue;
      float* to = at < 5 * L * N ? &now[buffer][at / (L * N)][at / N % L][at % N] : &D[buffer][at - 5 * L * N];
      UNROLL for (int e = 0; e < 4; e++) to[e] = four[i][e];
    }
    barrier();  // the other buffer is free again as well
    if (n + 1 < chunks) fetch(OUTPUT ? n + 1 : chunk - 1);
    float* to = (OUTPUT ? q.saved : q.gstates) + (index * chunks + chunk) * N * N;
    each(X, [&](int i, int j, float x) { to[(first + i) * N + j] = x; });
    if (D[buffer][N] != 0) from(OUTPUT ? q.initial : nullptr);
    const auto& map = now[buffer];
    // Z^T [16 values, 16 tokens] = Z0^T + X Q^T, as four sums, for shorter chains of operations
    float Z[2][L / 8][4] = {};
    each(Z[0], [&](int i, int j, float& z) { z = map[1][j][first + i]; });
    UNROLL for (int k = 0; k < N / 8; k++) {
      Split x[4];
      operand(x, X[k]);
      UNROLL for (int i = 0; i < L / 8; i++) {
        const float* row = &map[0][8 * i + g][8 * k + 2 * t];
        const Split y[2] = {split(row[0]), split(row[1])};
        multiply_add(Z[k % 2][i], x, y);
      }
    }
    each(X, [&](int, int j, float& x) { x *= D[buffer][j]; });
    UNROLL for (int k = 0; k < L / 8; k++) {
      float sum[4];
      UNROLL for (int e = 0; e < 4; e++) sum[e] = Z[0][k][e] + Z[1][k][e];
      Split z[4], y[4];
      operand(z, sum);
      UNROLL for (int e = 0; e < 4; e++) y[e] = split(map[4][8 * k + 2 * t + e / 2][first + g + e % 2 * 8]);
      UNROLL for (int i = 0; i < N / 8; i++) {
        const Split a[2] = {split(map[2][8 * k + 2 * t][8 * i + g]), split(map[2][8 * k + 2 * t + 1][8 * i + g])};
        const Split r[2] = {split(map[3][8 * k + 2 * t][8 * i + g]), split(map[3][8 * k + 2 * t + 1][8 * i + g])};
        multiply_add(X[i], y, r);
        multiply_add(X[i], z, a);
      }
    }
  }
  float* last = OUTPUT ? q.last : q.gfirst;
  each(X, [&](int i, int j, float x) { last[(index * N + first + i) * N + j] = x; });
}

template <class E> WKV_FN void parallel_output(const Wkv7Args& q) {
  SHARED_FLOATS(memory);
  const long long block = block_number(), chunk = block % chunks_of(q), begin = chunk * L;
  const Kernel<E> kernel = kernel_of<E>(q, memory, block / chunks_of(q));
  const unsigned char* starts = starts_of(q, kernel.index);
  Span span = chunk_span(q, chunk);
  while (span.end > begin) {
    span.begin = document(starts, begin, span.end);
    const bool fresh = starts && starts[span.begin];
    kernel.output(span, fresh ? q.initial : q.saved, fresh ? kernel.index : block);
    span.end = span.begin;
  }
}

#ifdef MATRIX_UNITS
#define KERNELS_OF(E)                                                                                      \
  KERNEL(32 * WARPS) wkv7_prepare_output_##E(const Wkv7Args q) { prepare<E, true>(q); }                     \
  KERNEL(32 * WARPS) wkv7_prepare_gradient_##E(const Wkv7Args q) { prepare<E, false>(q); }                  \
  KERNEL(32 * WARPS) wkv7_parallel_output_##E(const Wkv7Args q) { parallel_output<E>(q); }
KERNEL(32 * WARPS) wkv7_scan_output(const Wkv7Args q) { scan<true>(q); }
KERNEL(32 * WARPS) wkv7_scan_gradient(const Wkv7Args q) { scan<false>(q); }
#else  // never launched
#define KERNELS_OF(E)                                             \
  KERNEL(32 * WARPS) wkv7_prepare_output_##E(const Wkv7Args) {}   \
  KERNEL(32 * WARPS) wkv7_prepare_gradient_##E(const Wkv7Args) {} \
  KERNEL(32 * WARPS) wkv7_parallel_output_##E(const Wkv7Args) {}
KERNEL(32 * WARPS) wkv7_scan_output(const Wkv7Args) {}
KERNEL(32 * WARPS) wkv7_scan_gradient(const Wkv7Args) {}
#endif
KERNELS_OF(fp32)
KERNELS_OF(bf16)
KERNELS_OF(fp16)
#undef KERNELS_OF

}  // namespace wkv7_chunks
