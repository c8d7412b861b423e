// The elementwise CUDA kernels; fused_cpu_loops.h has the CPU loops. A thread processes FUSED_WIDTH
// neighbouring elements, 16 bytes per access, or single elements where length or alignment does not
// allow it (kernels named _any). Arithmetic is fp32 for every dtype.
//
// norm       one block for a few rows, which are read ahead and kept in registers up to 8192 channels
// norm_sums  gradients of w and b: one thread per 8 channels and slice of rows
// mix        one thread per 8 channels and slice of time: the previous token is still in registers.
//            The gradient runs backward in time
// loss       one block per row of logits: one pass for the maximum and the sum, one that replaces
//            the logits by their gradient and usually reads them from the L2 cache. Rows may be longer
//            than the vocabulary; what is beyond it is neither read nor written
// others     one thread per 8 elements
//
// No atomics, and every sum has a fixed order: results are bit-identical. The memory of a thread
// does not depend on any size.
#include "common/device.h"
#include "elementwise/fused_args.h"
#include "elementwise/vectors.h"

namespace fused {

#include "elementwise/fused.h"

// ---- LayerNorm ----
// A block works on `rows` rows, one after the other. It is as wide as a row, so in most models a thread
// has only its first W elements, which stay in registers; those of the next row are read before the sums
// of this one, which wait for all threads. Loops over the rest are not unrolled, which saves compile time.

struct Rows {
  long long first;
  int count;
};
WKV_FN Rows rows_of_block(const FusedNorm& q) {
  const long long first = (long long)block_number() * q.rows, left = q.N - first;
  return {first, left < q.rows ? (int)left : q.rows};
}

template <class X, class Y> WKV_FN void norm(const FusedNorm& q, X x_io, Y y_io) {
  constexpr int W = X::W;
  const int D = (int)q.D, mine = thread_number() * W, step = block_size() * W;
  const Rows rows = rows_of_block(q);
  typename X::Raw next = {};
  if (mine < D) next = x_io.raw(q.x, rows.first * D + mine);
#pragma unroll 1
  for (int n = 0; n < rows.count; n++) {
    const long long row = rows.first + n, at = row * D;
    const Vec<W> cached = x_io.of_raw(next);
    if (mine < D && n + 1 < rows.count) next = x_io.raw(q.x, at + D + mine);
    float sum = 0, squares = 0;
#pragma unroll 1
    for (int c = mine; c < D; c += step) {
      const Vec<W> x = c == mine ? cached : x_io.get(q.x, at + c);
      EACH sum += x.x[i];
    }
    const float mean = block_reduce<Add, 0>(sum) / D;
#pragma unroll 1
    for (int c = mine; c < D; c += step) {
      const Vec<W> x = c == mine ? cached : x_io.get(q.x, at + c);
      EACH squares += (x.x[i] - mean) * (x.x[i] - mean);
    }
    const float scale = 1.0f / square_root(block_reduce<Add, 1>(squares) / D + q.eps);
#pragma unroll 1
    for (int c = mine; c < D; c += step) {
      const Vec<W> w = load_floats<W>(q.w, c), b = load_floats<W>(q.b, c);
      Vec<W> x = c == mine ? cached : x_io.get(q.x, at + c);
      EACH x.x[i] = (x.x[i] - mean) * scale * w.x[i] + b.x[i];
      y_io.put(q.y, at + c, x);
    }
    if (thread_number() == 0) {
      q.stats[2 * row] = mean;
      q.stats[2 * row + 1] = scale;
    }
  }
}

template <class X, class Y> WKV_FN void norm_gradient(const FusedNorm& q, X x_io, Y y_io) {
  constexpr int W = X::W;
  const int D = (int)q.D, mine = thread_number() * W, step = block_size() * W;
  const Rows rows = rows_of_block(q);
  typename X::Raw next_x = {};
  typename Y::Raw next_gy = {};
  const auto read_ahead = [&](int n) {  // of row n
    if (mine >= D || n >= rows.count) return;
    const long long at = (rows.first + n) * D + mine;
    next_x = x_io.raw(q.x, at);
    next_gy = y_io.raw(q.gy, at);
  };
  constexpr bool ahead = sizeof next_x + sizeof next_gy < 64;  // for both in fp32 registers do not suffice
  if (ahead) read_ahead(0);
#pragma unroll 1
  for (int n = 0; n < rows.count; n++) {
    const long long row = rows.first + n, at = row * D;
    const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
    struct Both { Vec<W> normal, g; };  // normalised x and its gradient
    const auto both = [&](Vec<W> x, Vec<W> gy, int c) {
      const Vec<W> w = load_floats<W>(q.w, c);
      EACH x.x[i] = (x.x[i] - mean) * scale;
      EACH gy.x[i] *= w.x[i];
      return Both{x, gy};
    };
    const auto read = [&](int c) { return both(x_io.get(q.x, at + c), y_io.get(q.gy, at + c), c); };
    Both cached = {};
    if (mine < D) cached = ahead ? both(x_io.of_raw(next_x), y_io.of_raw(next_gy), mine) : read(mine);
    if (ahead) read_ahead(n + 1);
    float sum = 0, product = 0;
#pragma unroll 1
    for (int c = mine; c < D; c += step) {
      const Both x = c == mine ? cached : read(c);
      EACH sum += x.g.x[i];
      EACH product += x.g.x[i] * x.normal.x[i];
    }
    sum = block_reduce<Add, 0>(sum) / D;
    product = block_reduce<Add, 1>(product) / D;
#pragma unroll 1
    for (int c = mine; c < D; c += step) {
      const Both x = c == mine ? cached : read(c);
      Vec<W> gx;
      EACH gx.x[i] = fused_norm_gradient(x.g.x[i], 1.0f, x.normal.x[i], scale, sum, product);
      x_io.put(q.gx, at + c, gx);
    }
  }
}

template <class X, class Y> WKV_FN void norm_sums(const FusedNorm& q, X x_io, Y y_io) {
  constexpr int W = X::W;
  const long long groups = q.D / W, slice = thread_index() / groups, c = thread_index() % groups * W;
  const long long begin = slice * q.slice, end = begin + q.slice < q.N ? begin + q.slice : q.N;
  if (begin >= q.N) return;
  Vec<W> gw = {}, gb = {};
#pragma unroll 2
  for (long long row = begin; row < end; row++) {
    const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
    const Vec<W> x = x_io.get(q.x, row * q.D + c), gy = y_io.get(q.gy, row * q.D + c);
    EACH gw.x[i] += gy.x[i] * ((x.x[i] - mean) * scale);
    EACH gb.x[i] += gy.x[i];
  }
  store_floats<W>(q.gw, slice * q.D + c, gw);
  store_floats<W>(q.gb, slice * q.D + c, gb);
}

// ---- token shift and mixing ----

#define EACH_MIX _Pragma("unroll") for (int m = 0; m < 3; m++) if (m < q.count)

// Tokens [begin, end) of a batch row, and the first channel, of this thread. Q: FusedMix or ShiftArgs.
struct Span { long long b, part, begin, end, c; };
template <int W, class Q> WKV_FN bool locate(const Q& q, Span& at) {
  const long long groups = q.D / W, parts = (q.T + q.slice - 1) / q.slice, i = thread_index() / groups;
  at.c = thread_index() % groups * W;
  at.b = i / parts;
  at.part = i % parts;
  at.begin = at.part * q.slice;
  at.end = at.begin + q.slice < q.T ? at.begin + q.slice : q.T;
  return at.b < q.B;
}
template <class Q, class E> WKV_FN Vec<E::W> token(const Q& q, E io, const void* of, const Span& at, long long t) {
  return io.get(of, (at.b * q.T + t) * q.D + at.c);
}
// The token before t, ignoring document starts.
template <class Q, class E> WKV_FN Vec<E::W> before(const Q& q, E io, const Span& at, long long t) {
  return t ? token(q, io, q.x, at, t - 1) : io.get(q.last, at.b * q.D + at.c);
}
template <class Q> WKV_FN bool starts(const Q& q, const Span& at, long long t) { return q.reset && q.reset[at.b * q.T + t]; }

// Writes y of mixture m, its dropout, or both, from element `to` on.
template <class Q, class E> WKV_FN void put_mixture(const Q& q, E io, int m, long long to, Vec<E::W> y, unsigned seed) {
  constexpr int W = E::W;
  if (q.y[m]) io.put(q.y[m], to, y);
  if (!q.dropped[m]) return;
  EACH y.x[i] = fused_hash((unsigned)(to + i), seed) < q.below[m] ? 0.0f : io.rounded(y.x[i]) * q.scale[m];
  io.put(q.dropped[m], to, y);
}

template <class E> WKV_FN void mix(const FusedMix& q, E io) {
  constexpr int W = E::W;
  Span at;
  if (!locate<W>(q, at)) return;
  Vec<W> mixes[3];
  unsigned seeds[3] = {};
  EACH_MIX {
    mixes[m] = load_floats<W>(q.mix, m * q.D + at.c);
    if (q.dropped[m]) seeds[m] = (unsigned)*q.seed[m];
  }
  Vec<W> past = before(q, io, at, at.begin);
#pragma unroll 2
  for (long long t = at.begin; t < at.end; t++) {
    if (starts(q, at, t)) past = io.get(q.initial, at.b * q.D + at.c);
    const Vec<W> x = token(q, io, q.x, at, t);
    EACH_MIX {
      Vec<W> y;
      EACH y.x[i] = fused_mix(past.x[i], x.x[i], mixes[m].x[i]);
      put_mixture(q, io, m, (at.b * q.T + t) * q.D + at.c, y, seeds[m]);
    }
    past = x;
  }
}

template <class E> WKV_FN void mix_gradient(const FusedMix& q, E io) {
  constexpr int W = E::W;
  Span at;
  if (!locate<W>(q, at)) return;
  Vec<W> mixes[3], sums[3] = {}, carried = {}, x = {};  // carried: from the token after t
  EACH_MIX mixes[m] = load_floats<W>(q.mix, m * q.D + at.c);
  if (at.end < q.T && !starts(q, at, at.end)) EACH_MIX {
    const Vec<W> gy = token(q, io, q.gy[m], at, at.end);
    EACH carried.x[i] += (1.0f - mixes[m].x[i]) * gy.x[i];
  }
  if (q.gmix) x = token(q, io, q.x, at, at.end - 1);
#pragma unroll 1
  for (long long t = at.end - 1; t >= at.begin; t--) {
    const bool starts_here = starts(q, at, t);
    Vec<W> gx = carried, past = {}, difference = {};
    carried = {};
    if (q.gmix) {
      past = before(q, io, at, t);
      const Vec<W> previous = starts_here ? io.get(q.initial, at.b * q.D + at.c) : past;
      EACH difference.x[i] = x.x[i] - previous.x[i];
    }
    EACH_MIX {
      const Vec<W> gy = token(q, io, q.gy[m], at, t);
      EACH gx.x[i] += mixes[m].x[i] * gy.x[i];
      if (!starts_here) EACH carried.x[i] += (1.0f - mixes[m].x[i]) * gy.x[i];
      EACH sums[m].x[i] += gy.x[i] * difference.x[i];
    }
    io.put(q.gx, (at.b * q.T + t) * q.D + at.c, gx);
    x = past;
  }
  if (at.begin == 0) io.put(q.glast, at.b * q.D + at.c, carried);
  const long long parts = (q.T + q.slice - 1) / q.slice;
  if (q.gmix) EACH_MIX store_floats<W>(q.gmix, ((at.b * parts + at.part) * q.count + m) * q.D + at.c, sums[m]);
}

// ---- elementwise ----

// Calls work(at) for this thread's W of N elements.
template <int W, class F> WKV_FN void for_each_element(long long N, const F& work) {
  const long long at = thread_index() * W;
  if (at < N) work(at);
}

template <class E> WKV_FN void gate(const FusedGate& q, E io) {
  constexpr int W = E::W;
  for_each_element<W>(q.N, [&](long long at) {
    const Vec<W> r = io.get(q.r, at), v = io.get(q.v, at);
    Vec<W> y;
    EACH y.x[i] = fused_gate(r.x[i], v.x[i]);
    io.put(q.y, at, y);
  });
}
template <class E> WKV_FN void gate_gradient(const FusedGate& q, E io) {
  constexpr int W = E::W;
  for_each_element<W>(q.N, [&](long long at) {
    const Vec<W> r = io.get(q.r, at), v = io.get(q.v, at), g = io.get(q.g, at);
    Vec<W> gr, gv;
    EACH fused_gate_gradient(g.x[i], r.x[i], v.x[i], gr.x[i], gv.x[i]);
    io.put(q.gr, at, gr);
    io.put(q.gv, at, gv);
  });
}

template <class E> WKV_FN void relu2(const FusedEach& q, E io) {
  constexpr int W = E::W;
  for_each_element<W>(q.N, [&](long long at) {
    Vec<W> k = io.get(q.k, at);
    EACH k.x[i] = fused_relu2(k.x[i]);
    io.put(q.y, at, k);
  });
}
template <class E> WKV_FN void relu2_gradient(const FusedEach& q, E io) {
  constexpr int W = E::W;
  for_each_element<W>(q.N, [&](long long at) {
    const Vec<W> g = io.get(q.g, at);
    Vec<W> k = io.get(q.k, at);
    EACH k.x[i] = fused_relu2_gradient(g.x[i], k.x[i]);
    io.put(q.y, at, k);
  });
}
template <class E> WKV_FN void dropout(const FusedEach& q, E io) {
  constexpr int W = E::W;
  const unsigned seed = (unsigned)*q.seed;
  for_each_element<W>(q.N, [&](long long at) {
    const Vec<W> x = io.get(q.k, at);
    Vec<W> y = {};
    if (q.add) y = io.get(q.y, at);
    EACH y.x[i] += fused_hash((unsigned)(at + i), seed) < q.below ? 0.0f : x.x[i] * q.scale;
    io.put(q.y, at, y);
  });
}

// ---- loss ----

// Of the logits that a thread has seen: the largest, where the W of them begin that contain it first, and
// the sum of e^(logit − largest).
template <int W> struct Seen {
  float best = as_float(0xff800000u), sum = 0;  // −∞
  long long at;
  WKV_MEMBER explicit Seen(long long none) : at(none) {}
  WKV_MEMBER void add(Vec<W> x, long long c) {
    float most = x.x[0];
#pragma unroll
    for (int i = 1; i < W; i++) most = wkv_max(most, x.x[i]);
    if (most > best) {
      sum *= wkv_exp(best - most);
      best = most;
      at = c;
    }
    const float base = best == as_float(0xff800000u) ? 0 : best;  // −∞ − −∞ is NaN
    EACH sum += wkv_exp(x.x[i] - base);
  }
};

// Calls work(x, c, complete) for the W logits from c on of this thread's share of a row, in order, `ahead` of which
// are read at a time. Not complete: they are fewer than W, as the row ends; the others are −∞.
template <class E, class F> WKV_FN void for_each_logit(const FusedLoss& q, long long at, E io, const F& work) {
  constexpr int W = E::W, ahead = 4;
  const long long step = (long long)block_size() * W, whole = q.V / W * W;
  long long c = (long long)thread_number() * W;
#pragma unroll 1
  for (; c + (ahead - 1) * step < whole; c += ahead * step) {
    typename E::Raw raw[ahead];
#pragma unroll
    for (int k = 0; k < ahead; k++) raw[k] = io.raw(q.logits, at + c + k * step);
#pragma unroll
    for (int k = 0; k < ahead; k++) work(io.of_raw(raw[k]), c + k * step, true);
  }
#pragma unroll 1
  for (; c < q.V; c += step) {
    Vec<W> x;
    if (c < whole) x = io.get(q.logits, at + c);
    else EACH x.x[i] = c + i < q.V ? io.one(q.logits, at + c + i) : as_float(0xff800000u);
    work(x, c, c < whole);
  }
}

template <class E> WKV_FN void loss(const FusedLoss& q, E io) {
  constexpr int W = E::W;
  const long long row = block_number(), at = row * q.stride, target = q.target[row];
  const bool valid = target >= 0 && target < q.V;  // a kernel cannot raise: NaN instead
  const float at_target = valid ? io.one(q.logits, at + target) : as_float(0x7fc00000u);
  Seen<W> seen(q.V);
  for_each_logit(q, at, io, [&](Vec<W> x, long long c, bool) { seen.add(x, c); });
  const float top = block_reduce<Max, 0>(seen.best);
  const float all = block_reduce<Add, 1>(seen.sum * wkv_exp(seen.best - top)), share = 1.0f / all;
  const bool first = thread_number() == 0;
  if (first) {
    q.stats[3 * row] = top;
    q.stats[3 * row + 1] = all;
    q.stats[3 * row + 2] = at_target;
  }
  if (!q.gradient) return;
  long long argmax = q.V;  // the first of the largest logits
  if (seen.best == top)
    for (long long c = seen.at; c < q.V && argmax == q.V; c++)
      if (io.one(q.logits, at + c) == top) argmax = c;
  argmax = block_reduce<Min, 0>(argmax);
  // softmax; then −1 at the target and L2Wrap's term at the largest logit, rounded once
  const auto softmax = [&](float x) { return wkv_exp(x - top) * share; };
  for_each_logit(q, at, io, [&](Vec<W> x, long long c, bool complete) {
    EACH x.x[i] = softmax(x.x[i]);
    if (complete) return io.put(q.logits, at + c, x);
    EACH if (c + i < q.V) io.put_one(q.logits, at + c + i, x.x[i]);
  });
  barrier();
  const auto wrap = [&](long long c) { return c == argmax ? top * q.l2wrap : 0.0f; };
  if (first && valid) io.put_one(q.logits, at + target, softmax(at_target) - 1.0f + wrap(target));
  if (first && argmax < q.V && argmax != target) io.put_one(q.logits, at + argmax, softmax(top) + wrap(argmax));
}

// ---- kernels per dtype; LayerNorm per dtypes of its input and output ----

#define OF_TWO(name, X, Y)                                                                                          \
  KERNEL(FUSED_ROW_THREADS) fused_norm_##name(const FusedNorm q) { norm(q, X, Y); }                                 \
  KERNEL(FUSED_ROW_THREADS) fused_norm_gradient_##name(const FusedNorm q) { norm_gradient(q, X, Y); }               \
  KERNEL(FUSED_THREADS) fused_norm_sums_##name(const FusedNorm q) { norm_sums(q, X, Y); }
#define OF_ONE(name, E)                                                                                             \
  KERNEL(FUSED_THREADS) fused_gate_##name(const FusedGate q) { gate(q, E); }                                        \
  KERNEL(FUSED_THREADS) fused_gate_gradient_##name(const FusedGate q) { gate_gradient(q, E); }                      \
  KERNEL(FUSED_THREADS) fused_mix_##name(const FusedMix q) { mix(q, E); }                                           \
  KERNEL(FUSED_THREADS, 4) fused_mix_gradient_##name(const FusedMix q) { mix_gradient(q, E); }                      \
  KERNEL(FUSED_THREADS) fused_relu2_##name(const FusedEach q) { relu2(q, E); }                                      \
  KERNEL(FUSED_THREADS) fused_relu2_gradient_##name(const FusedEach q) { relu2_gradient(q, E); }                    \
  KERNEL(FUSED_THREADS) fused_dropout_##name(const FusedEach q) { dropout(q, E); }                                  \
  KERNEL(FUSED_LOSS_THREADS, 2) fused_loss_##name(const FusedLoss q) { loss(q, E); }
OF_TWO(fp32, Vectorized<fp32>{}, Vectorized<fp32>{})
OF_TWO(bf16, Vectorized<bf16>{}, Vectorized<bf16>{})
OF_TWO(fp16, Vectorized<fp16>{}, Vectorized<fp16>{})
OF_TWO(fp32_bf16, Vectorized<fp32>{}, Vectorized<bf16>{})
OF_TWO(fp32_fp16, Vectorized<fp32>{}, Vectorized<fp16>{})
OF_TWO(any, AnyDtype{q.x_dtype}, AnyDtype{q.y_dtype})
OF_ONE(fp32, Vectorized<fp32>{})
OF_ONE(bf16, Vectorized<bf16>{})
OF_ONE(fp16, Vectorized<fp16>{})
OF_ONE(any, AnyDtype{q.dtype})

}  // namespace fused
