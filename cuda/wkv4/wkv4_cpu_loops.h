// The WKV4 loops over time and channels, written once for vectors of WKV_BYTES bytes. A file per
// width (cpu_*.cpp) sets its target, WKV_BYTES and LOOPS and includes this one.
#include "wkv4/wkv4_cpu.h"
#include "common/cpu_block.h"
#include "wkv4/wkv4.h"

namespace {

// Time is processed in chunks of WKV4_SAVE_INTERVAL tokens, and within a chunk channels in blocks,
// so that a chunk touches few pages. (With time as the inner loop over all of T, every token would
// be on another page, and hardware prefetching stops at page boundaries.) Between chunks, states
// are stored where the backward pass reads them, and gradients in the outputs.
#define AT(tensor, t) ((tensor) + (row * q.T + (t)) * q.C + c)
#define PLANE(tensor, index, plane) ((tensor) + ((index) * 3 + (plane)) * q.C + c)
// Prefetches the same token `ahead` elements later, for reading or writing.
#define FETCH(tensor, t, to_write)                                      \
  for (int64_t line = 0; line < BLOCK * int64_t(sizeof(E)); line += 64) \
  __builtin_prefetch((const char*)(AT(tensor, t) + ahead) + line, to_write)

struct State { Block a, b, p; };

struct Chunk { int64_t index, begin, end; };  // tokens [begin, end)
WKV_FN Chunk chunk_at(int64_t index, int64_t T) {
  return {index, index * WKV4_SAVE_INTERVAL,
          (index + 1) * WKV4_SAVE_INTERVAL < T ? (index + 1) * WKV4_SAVE_INTERVAL : T};
}
WKV_FN int64_t chunks_of(int64_t T) { return (T + WKV4_SAVE_INTERVAL - 1) / WKV4_SAVE_INTERVAL; }
WKV_FN int64_t states_of(int64_t T) { return chunks_of(T) + 1; }

// Whether the whole block can use the unscaled steps (wkv4.h): small keys, and no document start.
template <class E, bool FULL>
WKV_FN bool can_skip_scaling(const Wkv4Problem& q, const Chunk& chunk, const Block& u, const Block& p, int64_t row,
                             int64_t c, int64_t n) {
  if (q.reset)
    for (int64_t t = chunk.begin; t < chunk.end; t++)
      if (q.reset[row * q.T + t]) return false;
  struct { wkv_bits g[GROUPS]; } largest = {};
  for (int64_t t = chunk.begin; t < chunk.end; t++) {
    const Block k = LOAD(AT(static_cast<const E*>(q.k), t));
    EACH_GROUP largest.g[g] = wkv_max_bits(largest.g[g], (wkv_bits)k.g[g] & 0x7fffffffu);
  }
  bool found = true;
  const wkv_float limit = wkv_float{} + WKV_UNSCALED_MAX;
  EACH_GROUP {
    const wkv_float largest_exponent = (wkv_float)largest.g[g] - wkv_negative_magnitude(u.g[g]);  // |k| + |u|
    found = all(largest_exponent <= limit) & all(p.g[g] <= limit) & found;
  }
  return found;
}

// A row of states [B, 3, C]; the empty state if null.
template <class E, bool FULL>
WKV_FN State state_of(const float* states, const Wkv4Problem& q, int64_t row, int64_t c, int64_t n) {
  if (states)
    return {canonical_nan(LOAD(PLANE(states, row, 0))), canonical_nan(LOAD(PLANE(states, row, 1))),
            canonical_nan(LOAD(PLANE(states, row, 2)))};
  State s = {};
  EACH_GROUP s.p.g[g] += WKV_EMPTY;
  return s;
}

template <class E, bool FULL>
WKV_FN void start(const Wkv4Problem& q, int64_t row, int64_t c, int64_t n) {
  const State s = state_of<E, FULL>(q.first, q, row, c, n);
  const int64_t at = row * states_of(q.T);
  STORE(PLANE(q.saved, at, 0), s.a);
  STORE(PLANE(q.saved, at, 1), s.b);
  STORE(PLANE(q.saved, at, 2), s.p);
}

template <class E, bool FULL>
WKV_FN void forward(const Wkv4Problem& q, const Wkv4Outputs& out, const Chunk& chunk, int64_t ahead, int64_t row,
                    int64_t c, int64_t n) {
  const E *k_ = static_cast<const E*>(q.k), *v_ = static_cast<const E*>(q.v);
  E* y_ = static_cast<E*>(out.y);
  const Block w = canonical_nan(LOAD(q.w + c)), u = canonical_nan(LOAD(q.u + c));
  const int64_t at = row * states_of(q.T) + chunk.index;
  State s = {LOAD(PLANE(q.saved, at, 0)), LOAD(PLANE(q.saved, at, 1)), LOAD(PLANE(q.saved, at, 2))};
  if (can_skip_scaling<E, FULL>(q, chunk, u, s.p, row, c, n)) {
    Block ew, eu, p = s.p;
    EACH_GROUP {
      ew.g[g] = wkv_exp(w.g[g]), eu.g[g] = wkv_exp(u.g[g]);
      wkv4_rescale(s.p.g[g], wkv_float{}, s.a.g[g], s.b.g[g]);
    }
    for (int64_t t = chunk.begin; t < chunk.end; t++) {
      FETCH(k_, t, 0);
      FETCH(v_, t, 0);
      FETCH(y_, t, 1);
      const Block k = LOAD(AT(k_, t)), v = LOAD(AT(v_, t));
      Block y;
      EACH_GROUP {
        const wkv_float e = wkv_exp_in_range(k.g[g]);
        y.g[g] = wkv4_unscaled_output(eu.g[g], e, v.g[g], s.a.g[g], s.b.g[g]);
        wkv4_unscaled_update(ew.g[g], e, v.g[g], s.a.g[g], s.b.g[g]);
        p.g[g] = wkv_max(p.g[g] + w.g[g], k.g[g]);
      }
      STORE(AT(y_, t), y);
    }
    EACH_GROUP wkv4_rescale(wkv_float{}, p.g[g], s.a.g[g], s.b.g[g]);
    s.p = p;
  } else {
    for (int64_t t = chunk.begin; t < chunk.end; t++) {
      if (q.reset && q.reset[row * q.T + t]) s = state_of<E, FULL>(q.initial, q, row, c, n);
      const Block k = LOAD(AT(k_, t)), v = LOAD(AT(v_, t));
      Block y;
      EACH_GROUP {
        y.g[g] = wkv4_output(u.g[g], k.g[g], v.g[g], s.a.g[g], s.b.g[g], s.p.g[g]);
        wkv4_update(w.g[g], k.g[g], v.g[g], s.a.g[g], s.b.g[g], s.p.g[g]);
      }
      STORE(AT(y_, t), y);
    }
  }
  STORE(PLANE(q.saved, at + 1, 0), s.a);
  STORE(PLANE(q.saved, at + 1, 1), s.b);
  STORE(PLANE(q.saved, at + 1, 2), s.p);
}

template <class E, bool FULL>
WKV_FN void start(const Wkv4Problem& q, const Wkv4Gradients& grad, int64_t row, int64_t c, int64_t n) {
  Block ga = {}, gb = {};
  if (grad.last) {
    ga = canonical_nan(LOAD(PLANE(grad.last, row, 0)));
    gb = canonical_nan(LOAD(PLANE(grad.last, row, 1)));
  }
  STORE(PLANE(grad.first, row, 0), ga);
  STORE(PLANE(grad.first, row, 1), gb);
  STORE(PLANE(grad.first, row, 2), (Block{}));
  if (grad.initial)
    for (int plane = 0; plane < 3; plane++) STORE(PLANE(grad.initial, row, plane), (Block{}));
  STORE(grad.w + row * q.C + c, (Block{}));
  STORE(grad.u + row * q.C + c, (Block{}));
}

template <class E, bool FULL>
WKV_FN void backward(const Wkv4Problem& q, const Wkv4Gradients& grad, const Chunk& chunk, int64_t ahead, int64_t row,
                     int64_t c, int64_t n) {
  const E *k_ = static_cast<const E*>(q.k), *v_ = static_cast<const E*>(q.v), *gy_ = static_cast<const E*>(grad.y);
  E *gk_ = static_cast<E*>(grad.k), *gv_ = static_cast<E*>(grad.v);
  const Block w = canonical_nan(LOAD(q.w + c)), u = canonical_nan(LOAD(q.u + c));
  float *gw_ = grad.w + row * q.C + c, *gu_ = grad.u + row * q.C + c, *ga_ = PLANE(grad.first, row, 0),
        *gb_ = PLANE(grad.first, row, 1);
  Block ga = LOAD(ga_), gb = LOAD(gb_), gw = LOAD(gw_), gu = LOAD(gu_);
  const int64_t at = row * states_of(q.T) + chunk.index;
  State s = {LOAD(PLANE(q.saved, at, 0)), LOAD(PLANE(q.saved, at, 1)), LOAD(PLANE(q.saved, at, 2))};
  if (can_skip_scaling<E, FULL>(q, chunk, u, s.p, row, c, n)) {
    const Block start = s.p, end = LOAD(PLANE(q.saved, at + 1, 2));
    Block ew, eu, sum_w = {}, sum_u = {};
    EACH_GROUP {
      ew.g[g] = wkv_exp(w.g[g]), eu.g[g] = wkv_exp(u.g[g]);
      wkv4_rescale(start.g[g], wkv_float{}, s.a.g[g], s.b.g[g]);
      wkv4_rescale(wkv_float{}, end.g[g], ga.g[g], gb.g[g]);  // gradients scale inversely
    }
    struct { Block a, b, e; } states[WKV4_SAVE_INTERVAL];
    for (int64_t t = chunk.begin; t < chunk.end; t++) {
      const int64_t i = t - chunk.begin;
      FETCH(k_, t, 0);
      FETCH(v_, t, 0);
      const Block k = LOAD(AT(k_, t)), v = LOAD(AT(v_, t));
      states[i].a = s.a, states[i].b = s.b;
      EACH_GROUP {
        const wkv_float e = states[i].e.g[g] = wkv_exp_in_range(k.g[g]);
        wkv4_unscaled_update(ew.g[g], e, v.g[g], s.a.g[g], s.b.g[g]);
      }
    }
    for (int64_t t = chunk.end - 1; t >= chunk.begin; t--) {
      const int64_t i = t - chunk.begin;
      FETCH(gy_, t, 0);
      FETCH(gk_, t, 1);
      FETCH(gv_, t, 1);
      const Block v = LOAD(AT(v_, t)), gy = LOAD(AT(gy_, t));
      Block gk, gv;
      EACH_GROUP
        wkv4_unscaled_backward(ew.g[g], eu.g[g], states[i].e.g[g], v.g[g], states[i].a.g[g], states[i].b.g[g],
                               gy.g[g], ga.g[g], gb.g[g], sum_w.g[g], sum_u.g[g], gk.g[g], gv.g[g]);
      STORE(AT(gk_, t), gk);
      STORE(AT(gv_, t), gv);
    }
    EACH_GROUP {
      gw.g[g] += ew.g[g] * sum_w.g[g];
      gu.g[g] += eu.g[g] * sum_u.g[g];
      wkv4_rescale(start.g[g], wkv_float{}, ga.g[g], gb.g[g]);
    }
  } else {
    State states[WKV4_SAVE_INTERVAL];  // before each token
    WkvPair f[WKV4_SAVE_INTERVAL][GROUPS];  // of each update
    for (int64_t t = chunk.begin; t < chunk.end; t++) {
      if (q.reset && q.reset[row * q.T + t]) s = state_of<E, FULL>(q.initial, q, row, c, n);
      const int64_t i = t - chunk.begin;
      states[i] = s;
      const Block k = LOAD(AT(k_, t)), v = LOAD(AT(v_, t));
      EACH_GROUP f[i][g] = wkv4_update(w.g[g], k.g[g], v.g[g], s.a.g[g], s.b.g[g], s.p.g[g]);
    }
    for (int64_t t = chunk.end - 1; t >= chunk.begin; t--) {
      const int64_t i = t - chunk.begin;
      const Block k = LOAD(AT(k_, t)), v = LOAD(AT(v_, t)), gy = LOAD(AT(gy_, t));
      Block gk, gv;
      EACH_GROUP
        wkv4_backward(f[i][g], u.g[g], k.g[g], v.g[g], states[i].a.g[g], states[i].b.g[g], states[i].p.g[g],
                      gy.g[g], ga.g[g], gb.g[g], gw.g[g], gu.g[g], gk.g[g], gv.g[g]);
      STORE(AT(gk_, t), gk);
      STORE(AT(gv_, t), gv);
      if (q.reset && q.reset[row * q.T + t]) {  // this token started from the initial state
        if (grad.initial) {
          float *a_ = PLANE(grad.initial, row, 0), *b_ = PLANE(grad.initial, row, 1);
          Block a = LOAD(a_), b = LOAD(b_);
          EACH_GROUP a.g[g] += ga.g[g], b.g[g] += gb.g[g];
          STORE(a_, a);
          STORE(b_, b);
        }
        ga = gb = {};
      }
    }
  }
  STORE(ga_, ga);
  STORE(gb_, gb);
  STORE(gw_, gw);
  STORE(gu_, gu);
}

// Calls WORK for each block of the channels [c, c + n).
#define IN_BLOCKS(WORK, ...) \
  for (int64_t at = c; at < c + n; at += BLOCK) { \
    const int64_t left = c + n - at; \
    if (left >= BLOCK) WORK<E, true>(__VA_ARGS__, row, at, BLOCK); \
    else WORK<E, false>(__VA_ARGS__, row, at, left); \
  }

template <class E>
void all_forward(const Wkv4Problem& q, const Wkv4Outputs& out, int64_t row, int64_t c, int64_t n) {
  IN_BLOCKS(start, q)
  for (int64_t index = 0; index < chunks_of(q.T); index++) {
    const Chunk chunk = chunk_at(index, q.T);
    IN_BLOCKS(forward, q, out, chunk, left > BLOCK ? BLOCK : WKV4_SAVE_INTERVAL * q.C + c - at)
  }
}

template <class E>
void all_backward(const Wkv4Problem& q, const Wkv4Gradients& grad, int64_t row, int64_t c, int64_t n) {
  IN_BLOCKS(start, q, grad)
  for (int64_t index = chunks_of(q.T) - 1; index >= 0; index--) {
    const Chunk chunk = chunk_at(index, q.T);
    IN_BLOCKS(backward, q, grad, chunk, left > BLOCK ? BLOCK : c - at - WKV4_SAVE_INTERVAL * q.C)
  }
}

}  // namespace

const Wkv4Loops LOOPS(wkv4) = {
    BLOCK, {all_forward<float>, all_forward<bf16>}, {all_backward<float>, all_backward<bf16>}};
