// The gradient of WKV7 in the chunk form (cuda/README.md). After wkv7_chunk_prepare:
//
//   wkv7_chunk_scan_gradient  the gradient of the state after each chunk, from the last chunk to the first
//   wkv7_chunk_gradient       the gradients of a chunk's tokens from it and the saved state before the chunk; all
//                             chunks in parallel
#include "wkv7/wkv7_chunk.h"

#ifdef TENSOR_CORES
namespace wkv7_chunk {

KERNEL(WKV7_CHUNK_THREADS, 2) wkv7_chunk_scan_gradient(const Wkv7ChunkArgs q) { scan<true>(q); }

struct GradientMemory {
  Tokens scaled[SCALED];
  // V, gy, SA and gU (cuda/README.md); then the gradients of K~, R~, B~ and A~
  Tokens v, gy, sa, gsa;
  Pairs pairs[WKV7_PAIRS], gpairs[4];
  float decay[N], gdecay[N];  // of the whole chunk
};

// Values: a warp has 16 of them. Writes gv, and puts SA into m.sa and gU into m.gsa.
WKV_FN void value_gradients(GradientMemory& m, const Wkv7ChunkArgs& q, const Place& p, const float* state,
                            const float* gstate) {
  const Wkv7Chunk& from = *work(q, p);
  const int first = p.warp * 16;
  const auto columns_of = [&](const Tokens& x) { return [&x, first](int i, int j) { return x[i][first + j]; }; };
  const auto transposed = [&](int pair) { return [&m, pair](int i, int j) { return m.pairs[pair][j][i]; }; };
  const auto put = [&](Tokens& at, Tile<2>& d) {
    each(d, p, [&](int i, int j, float x) { at[i][first + j] = x; });
  };
  Tile<2> sa[1];
  each(sa[0], p, [&](int i, int j, float& x) { x = from.sa_own[i][first + j]; });
  state_products(sa, p, from.own, state, initial(q, p), [&](int, int i, int key) { return from.sa[i][key]; },
                 [&](const float* at, int key, int j) { return at[(first + j) * N + key]; });
  put(m.sa, sa[0]);

  Tile<2> g[2], gsa[1], gv[1];  // of SA, of V
  clear(g);
  products<N>(g, p, [&](int which, int i, int key) { return (which == 0 ? from.b : from.k)[i][key]; },
              [&](int key, int j) { return gstate[(first + j) * N + key]; });
  UNROLL for (int tile = 0; tile < 2; tile++)
    UNROLL for (int i = 0; i < 4; i++) gsa[0][tile][i] = g[0][tile][i], gv[0][tile][i] = g[1][tile][i];
  product<L>(gsa, p, transposed(WKV7_RB), columns_of(m.gy));
  put(m.gsa, gsa[0]);
  warp_barrier();
  clear(gsa);
  product<L>(gsa, p, transposed(WKV7_INVERSE), columns_of(m.gsa));
  warp_barrier();
  put(m.gsa, gsa[0]);
  warp_barrier();
  product<L>(gv, p, transposed(WKV7_RK), columns_of(m.gy));
  product<L>(gv, p, transposed(WKV7_AK), columns_of(m.gsa));
  write_values(q.gv, gv[0], q, p);
}

// Keys: a warp has 16 of them. The gradients of A~, R~, K~, B~ and of the chunk's decay.
struct KeyGradients { Tile<2> ar[2], kb[2]; };
WKV_FN void key_gradients(KeyGradients& g, GradientMemory& m, const Wkv7ChunkArgs& q, const Place& p, unsigned starts,
                          const float* state, const float* gstate) {
  const int own = first_start(starts), first = p.warp * 16;
  const auto columns_of = [&](const Tokens& x) { return [&x, first](int i, int j) { return x[i][first + j]; }; };
  clear(g.ar);
  state_products(g.ar, p, own, state, initial(q, p),
                 [&](int which, int i, int value) { return (which == 0 ? m.gsa : m.gy)[i][value]; },
                 [&](const float* at, int value, int j) { return at[value * N + first + j]; });
  products<L>(g.ar, p, [&](int which, int i, int j) { return m.gpairs[which == 0 ? WKV7_AK : WKV7_RK][i][j]; },
              columns_of(m.scaled[K]));
  products<L>(g.ar, p, [&](int which, int i, int j) { return m.gpairs[which == 0 ? WKV7_AB : WKV7_RB][i][j]; },
              columns_of(m.scaled[B]));

  clear(g.kb);
  products<N>(g.kb, p, [&](int which, int i, int value) { return (which == 0 ? m.v : m.sa)[i][value]; },
              [&](int value, int j) { return gstate[value * N + first + j]; });
  // Through the outgoing state, to which the tokens of its document add; their sum is part of gdecay
  float sums[2][2] = {{0, 0}, {0, 0}};
  UNROLL for (int which = 0; which < 2; which++) UNROLL for (int tile = 0; tile < 2; tile++)
    UNROLL for (int e = 0; e < 4; e++) {
      const int i = p.g + e / 2 * 8, key = first + 8 * tile + 2 * p.t + e % 2;
      float& x = g.kb[which][tile][e];
      x = same_document(starts, L - 1, i) ? x * m.decay[key] : 0;
      sums[tile][e % 2] += x * m.scaled[which == 0 ? K : B][i][key];
    }
  products<L>(g.kb, p, [&](int which, int i, int j) { return m.gpairs[which == 0 ? WKV7_RK : WKV7_RB][j][i]; },
              columns_of(m.scaled[R]));
  products<L>(g.kb, p, [&](int which, int i, int j) { return m.gpairs[which == 0 ? WKV7_AK : WKV7_AB][j][i]; },
              columns_of(m.scaled[A]));
  // The incoming state's own share
  const float* base = own < L ? initial(q, p) : state;
  if (base) UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int e = 0; e < 2; e++) {
    const int key = first + 8 * tile + 2 * p.t + e;
    float sum = 0;
    UNROLL for (int value = p.g; value < N; value += 8) sum += gstate[value * N + key] * base[value * N + key];
    sums[tile][e] += sum * m.decay[key];
  }
  UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int e = 0; e < 2; e++) {
    float sum = sums[tile][e];
    UNROLL for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (p.g == 0) m.gdecay[first + 8 * tile + 2 * p.t + e] = sum;
  }
}

KERNEL(WKV7_CHUNK_THREADS, 3) wkv7_chunk_gradient(const Wkv7ChunkArgs q) {
  SHARED GradientMemory m;
  const Place p = place_of_chunk(q);
  const Wkv7Chunk& from = *work(q, p);
  const float *state = saved(q, p), *gstate = q.gstates + (p.index * q.chunks + p.chunk) * N * N;
  const unsigned starts = starts_of(q, p);
  const int key = p.thread % N, second = p.thread / N, first = p.warp * 16;
  float w[L];
  read_decays(w, q, p, starts, key);
  put_scaled(m.scaled, w, q, p, starts);
  if (!second) m.decay[key] = w[L - 1];
  put_column(second ? m.gy : m.v, second ? q.gy : q.v, q, p);
  for (int i = p.thread; i < WKV7_PAIRS * L * L; i += THREADS)
    m.pairs[i / (L * L)][i / L % L][i % L] = from.pairs[i / (L * L)][i / L % L][i % L];
  barrier();
  value_gradients(m, q, p, state, gstate);
  barrier();
  put_pairs(m.gpairs[p.warp], p, starts, m.gsa, m.gy, m.v, m.sa);
  barrier();
  KeyGradients g;
  key_gradients(g, m, q, p, starts, state, gstate);
  barrier();
  UNROLL for (int which = 0; which < 2; which++) {
    each(g.ar[which], p, [&](int i, int j, float x) { (which == 0 ? m.gsa : m.gy)[i][first + j] = x; });
    each(g.kb[which], p, [&](int i, int j, float x) { (which == 0 ? m.v : m.sa)[i][first + j] = x; });
  }
  barrier();
  // d log W_i for each token i: of R~, K~, B~; that of A~ belongs to the token before. A log-decay is part of all W
  // from its token to the end of its document, or of the chunk.
  read_decays(w, q, p, starts, key);  // again, as registers are scarce in between
  float gw[L], x[L], y[L], sum = m.gdecay[key];
  UNROLL for (int i = L - 1; i >= 0; i--) {
    sum += m.gy[i][key] * m.scaled[R][i][key] - m.v[i][key] * m.scaled[K][i][key] - m.sa[i][key] * m.scaled[B][i][key];
    gw[i] = sum;
    sum = starts >> i & 1 ? 0 : sum + m.gsa[i][key] * m.scaled[A][i][key];
    const float inverse = 1 / w[i];
    x[i] = second ? m.v[i][key] * inverse : m.gsa[i][key] * before(w, starts, i);
    y[i] = second ? m.sa[i][key] * inverse : m.gy[i][key] * w[i];
  }
  write_column(second ? q.gk : q.ga, x, q, p, key);
  write_column(second ? q.gb : q.gr, y, q, p, key);
  if (!second) write_column<fp32>(q.gw, gw, q, p, key);
}

}  // namespace wkv7_chunk
#endif
