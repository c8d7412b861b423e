// The CPU unit's loops over time and channels, written once for vectors of WKV_BYTES bytes. A file per width (wkv4_cpu_*.cpp)
// names its target, WKV_BYTES and WKV_LOOPS and includes this one.
#include "wkv4_cpu.h"
#include "cpu_block.h"
#include "wkv4.h"

namespace {

#define AT(tensor, t) ((tensor) + (row * q.T + (t)) * q.C + c)
// Brings a token's block of a tensor into the cache, to be written or only read. Tokens are C numbers apart, mostly on different pages, and
// at the end of a page the processor's own prefetching ends. Outside of the tensor it does nothing.
#define AHEAD 8  // tokens
#define FETCH(tensor, t, to_write) \
  for (int64_t line = 0; line < BLOCK * int64_t(sizeof(E)); line += 64) __builtin_prefetch((const char*)AT(tensor, t) + line, to_write)
#define PLANE(tensor, index, plane) ((tensor) + ((index) * 3 + (plane)) * q.C + c)

struct State { Block a, b, p; };
WKV_FN void clear(State& s) { EACH_GROUP { s.a.g[g] = s.b.g[g] = wkv_float{}; s.p.g[g] = wkv_float{} + WKV_EMPTY; } }

template <class E, bool FULL>
WKV_FN void forward(const Wkv4Problem& q, const Wkv4Outputs& out, int64_t row, int64_t c, int64_t n) {
  const E *k_ = static_cast<const E*>(q.k), *v_ = static_cast<const E*>(q.v);
  E* y_ = static_cast<E*>(out.y);
  const int64_t chunks = (q.T + WKV_KEEP - 1) / WKV_KEEP;
  const Block w = tidy(LOAD(q.w + c)), u = tidy(LOAD(q.u + c));
  State s;
  clear(s);
  if (q.first) s = {tidy(LOAD(PLANE(q.first, row, 0))), tidy(LOAD(PLANE(q.first, row, 1))), tidy(LOAD(PLANE(q.first, row, 2)))};
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    STORE(PLANE(q.kept, row * chunks + chunk, 0), s.a);
    STORE(PLANE(q.kept, row * chunks + chunk, 1), s.b);
    STORE(PLANE(q.kept, row * chunks + chunk, 2), s.p);
    const int64_t end = chunk + 1 == chunks ? q.T : (chunk + 1) * WKV_KEEP;
    for (int64_t t = chunk * WKV_KEEP; t < end; t++) {
      if (q.reset && q.reset[row * q.T + t]) clear(s);
      FETCH(k_, t + AHEAD, 0);
      FETCH(v_, t + AHEAD, 0);
      FETCH(y_, t + AHEAD, 1);
      const Block k = LOAD(AT(k_, t)), v = LOAD(AT(v_, t));
      Block y;
      EACH_GROUP {
        y.g[g] = wkv4_output(u.g[g], k.g[g], v.g[g], s.a.g[g], s.b.g[g], s.p.g[g]);
        wkv4_update(w.g[g], k.g[g], v.g[g], s.a.g[g], s.b.g[g], s.p.g[g]);
      }
      STORE(AT(y_, t), y);
    }
  }
  STORE(PLANE(out.last, row, 0), s.a);
  STORE(PLANE(out.last, row, 1), s.b);
  STORE(PLANE(out.last, row, 2), s.p);
}

template <class E, bool FULL>
WKV_FN void backward(const Wkv4Problem& q, const Wkv4Gradients& grad, int64_t row, int64_t c, int64_t n) {
  const E *k_ = static_cast<const E*>(q.k), *v_ = static_cast<const E*>(q.v), *gy_ = static_cast<const E*>(grad.y);
  E *gk_ = static_cast<E*>(grad.k), *gv_ = static_cast<E*>(grad.v);
  const int64_t chunks = (q.T + WKV_KEEP - 1) / WKV_KEEP;
  const Block w = tidy(LOAD(q.w + c)), u = tidy(LOAD(q.u + c));
  State before[WKV_KEEP];  // the tokens of one chunk, and the factors their updates had
  WkvPair f[WKV_KEEP][GROUPS];
  Block ga = {}, gb = {}, gw = {}, gu = {};
  if (grad.last) {
    ga = tidy(LOAD(PLANE(grad.last, row, 0)));
    gb = tidy(LOAD(PLANE(grad.last, row, 1)));
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * WKV_KEEP, length = q.T - begin < WKV_KEEP ? q.T - begin : WKV_KEEP;
    const int64_t at = row * chunks + chunk;
    State s = {LOAD(PLANE(q.kept, at, 0)), LOAD(PLANE(q.kept, at, 1)), LOAD(PLANE(q.kept, at, 2))};
    for (int64_t i = 0; i < length; i++) {
      if (q.reset && q.reset[row * q.T + begin + i]) clear(s);
      before[i] = s;
      FETCH(gy_, begin + i, 0);
      FETCH(gk_, begin + i, 1);
      FETCH(gv_, begin + i, 1);
      const Block k = LOAD(AT(k_, begin + i)), v = LOAD(AT(v_, begin + i));
      EACH_GROUP f[i][g] = wkv4_update(w.g[g], k.g[g], v.g[g], s.a.g[g], s.b.g[g], s.p.g[g]);
    }
    for (int64_t i = length - 1; i >= 0; i--) {
      FETCH(k_, begin + i - WKV_KEEP, 0);
      FETCH(v_, begin + i - WKV_KEEP, 0);
      const Block k = LOAD(AT(k_, begin + i)), v = LOAD(AT(v_, begin + i)), gy = LOAD(AT(gy_, begin + i));
      Block gk, gv;
      EACH_GROUP
        wkv4_backward(f[i][g], u.g[g], k.g[g], v.g[g], before[i].a.g[g], before[i].b.g[g], before[i].p.g[g], gy.g[g], ga.g[g], gb.g[g],
                      gw.g[g], gu.g[g], gk.g[g], gv.g[g]);
      STORE(AT(gk_, begin + i), gk);
      STORE(AT(gv_, begin + i), gv);
      if (q.reset && q.reset[row * q.T + begin + i]) ga = gb = {};  // nothing before a document's start reaches it
    }
  }
  STORE(grad.w + row * q.C + c, gw);
  STORE(grad.u + row * q.C + c, gu);
  STORE(PLANE(grad.first, row, 0), ga);
  STORE(PLANE(grad.first, row, 1), gb);
  STORE(PLANE(grad.first, row, 2), (Block{}));
}

template <class E>
void forward_any(const Wkv4Problem& q, const Wkv4Outputs& out, int64_t row, int64_t c, int64_t n) {
  if (n == BLOCK) forward<E, true>(q, out, row, c, n);
  else forward<E, false>(q, out, row, c, n);
}

template <class E>
void backward_any(const Wkv4Problem& q, const Wkv4Gradients& grad, int64_t row, int64_t c, int64_t n) {
  if (n == BLOCK) backward<E, true>(q, grad, row, c, n);
  else backward<E, false>(q, grad, row, c, n);
}

}  // namespace

const Wkv4Loops WKV_LOOPS = {WKV_NAME, BLOCK, {forward_any<float>, forward_any<bf16>}, {backward_any<float>, backward_any<bf16>}};
