// The CUDA kernels of RWKV-6's token shift, whose weights depend on the data: for each of up to five
// mixtures m,
//
//   y = x + (before − x) (mix + part)        before: the previous token, or 0 at a document start
//
// As the kernels of `mix` in fused.cu, after which this file is included: a thread has 8 channels and
// a slice of time; the gradient runs backward in time; adapters' dropout of y is computed with it. A
// part of a weight is read and its gradient is written once. `mix` is loaded for every token, from the
// cache: registers are scarce.
#include "elementwise/shift_args.h"

namespace fused {

#define EACH_PART _Pragma("unroll") for (int m = 0; m < SHIFT_MAX; m++) if (m < q.count)

// The weight of the previous token in mixture m.
template <class E> WKV_FN Vec<E::W> shift_weight(const ShiftArgs& q, E io, const Span& at, long long t, int m) {
  constexpr int W = E::W;
  Vec<W> weight = io.get(q.parts, ((m * q.B + at.b) * q.T + t) * q.D + at.c);
  const Vec<W> mix = load_floats<W>(q.mix, m * q.D + at.c);
  EACH weight.x[i] += mix.x[i];
  return weight;
}

template <class E> WKV_FN void shift(const ShiftArgs& q, E io) {
  constexpr int W = E::W;
  Span at;
  if (!locate<W>(q, at)) return;
  unsigned seeds[SHIFT_MAX] = {};
  EACH_PART if (q.dropped[m]) seeds[m] = (unsigned)*q.seed[m];
  Vec<W> past = before(q, io, at, at.begin);
#pragma unroll 1
  for (long long t = at.begin; t < at.end; t++) {
    if (starts(q, at, t)) past = {};
    const Vec<W> x = token(q, io, q.x, at, t);
    EACH_PART {
      Vec<W> y = shift_weight(q, io, at, t, m);
      EACH y.x[i] = x.x[i] + (past.x[i] - x.x[i]) * y.x[i];
      put_mixture(q, io, m, (at.b * q.T + t) * q.D + at.c, y, seeds[m]);
    }
    past = x;
  }
}

template <class E> WKV_FN void shift_gradient(const ShiftArgs& q, E io) {
  constexpr int W = E::W;
  Span at;
  if (!locate<W>(q, at)) return;
  Vec<W> sums[SHIFT_MAX] = {}, carried = {};  // carried: from the token after t
  if (at.end < q.T && !starts(q, at, at.end)) EACH_PART {
    const Vec<W> gy = token(q, io, q.gy[m], at, at.end), weight = shift_weight(q, io, at, at.end, m);
    EACH carried.x[i] += gy.x[i] * weight.x[i];
  }
  Vec<W> x = token(q, io, q.x, at, at.end - 1);
#pragma unroll 1
  for (long long t = at.end - 1; t >= at.begin; t--) {
    const bool starts_here = starts(q, at, t);
    const Vec<W> past = before(q, io, at, t);
    Vec<W> gx = carried, difference;
    carried = {};
    EACH difference.x[i] = (starts_here ? 0.0f : past.x[i]) - x.x[i];
    EACH_PART {
      const Vec<W> gy = token(q, io, q.gy[m], at, t), weight = shift_weight(q, io, at, t, m);
      Vec<W> g;
      EACH g.x[i] = gy.x[i] * difference.x[i];
      EACH gx.x[i] += gy.x[i] * (1.0f - weight.x[i]);
      if (!starts_here) EACH carried.x[i] += gy.x[i] * weight.x[i];
      EACH sums[m].x[i] += g.x[i];
      io.put(q.gparts, ((m * q.B + at.b) * q.T + t) * q.D + at.c, g);
    }
    io.put(q.gx, (at.b * q.T + t) * q.D + at.c, gx);
    x = past;
  }
  if (at.begin == 0) io.put(q.glast, at.b * q.D + at.c, carried);
  const long long parts = (q.T + q.slice - 1) / q.slice;
  if (q.gmix) EACH_PART store_floats<W>(q.gmix, ((at.b * parts + at.part) * q.count + m) * q.D + at.c, sums[m]);
}

#define KERNELS_OF(name, E)                                                               \
  KERNEL(FUSED_THREADS, 8) fused_shift_##name(const ShiftArgs q) { shift(q, E); }         \
  KERNEL(FUSED_THREADS, 4) fused_shift_gradient_##name(const ShiftArgs q) { shift_gradient(q, E); }
KERNELS_OF(fp32, Vectorized<fp32>{})
KERNELS_OF(bf16, Vectorized<bf16>{})
KERNELS_OF(fp16, Vectorized<fp16>{})
KERNELS_OF(any, AnyDtype{q.dtype})
#undef KERNELS_OF
#undef EACH_PART

}  // namespace fused
