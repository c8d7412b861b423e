// The CUDA unit's fused operations: what fused_cpu_loops.h is on CPUs. A thread takes FUSED_WIDTH neighbouring numbers at a time, 16 bytes to an access,
// or one by one where a tensor does not allow it (the kernels named _any). Arithmetic is in fp32 whatever the tensors are.
//
// norm       a block per row, which stays in registers up to 8192 channels. Sums within a row go lane by lane, then warp by warp
// norm_sums  the gradients of w and b: a thread per 8 channels and slice of rows
// mix        a thread per 8 channels and slice of time: the token before is the one it has just had. Its gradient runs against time
// loss       a block per row of logits: once for the largest and the sum, once more for the gradient in their place
// the rest   element by element
//
// Nothing is added atomically and every sum has a fixed order: the same bits twice. No thread's memory grows with a size.
#include "common/device.h"
#include "elementwise/fused_args.h"

namespace fused {

#include "elementwise/fused.h"

// ---- numbers, eight at a time ----

template <int W> struct Numbers { float x[W]; };
typedef Numbers<8> Eight;
static_assert(FUSED_WIDTH == 8, "");
#define EACH _Pragma("unroll") for (int i = 0; i < W; i++)
struct alignas(16) Words { unsigned w[4]; };

WKV_FN Words words(const void* from) {
  const uint4 v = *(const uint4*)from;
  return {{v.x, v.y, v.z, v.w}};
}
WKV_FN void put_words(void* to, Words v) { *(uint4*)to = uint4{v.w[0], v.w[1], v.w[2], v.w[3]}; }

template <class E> WKV_FN Eight get_wide(const E* p) {  // of 16 bits each
  const Words v = words(p);
  Eight y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const E low = {(unsigned short)v.w[i]}, high = {(unsigned short)(v.w[i] >> 16)};
    y.x[2 * i] = load(&low);
    y.x[2 * i + 1] = load(&high);
  }
  return y;
}
WKV_FN Eight get_wide(const fp32* p) {
  const Words low = words(p), high = words(p + 4);
  Eight y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    y.x[i] = as_float(low.w[i]);
    y.x[4 + i] = as_float(high.w[i]);
  }
  return y;
}
template <class E> WKV_FN void put_wide(E* p, Eight x) {
  Words v;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    E low, high;
    store(&low, x.x[2 * i]);
    store(&high, x.x[2 * i + 1]);
    v.w[i] = low.bits | (unsigned)high.bits << 16;
  }
  put_words(p, v);
}
WKV_FN void put_wide(fp32* p, Eight x) {
  Words low, high;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    low.w[i] = as_bits(x.x[i]);
    high.w[i] = as_bits(x.x[4 + i]);
  }
  put_words(p, low);
  put_words(p + 4, high);
}

// How a tensor's numbers are read and written, W of them from a place on: FUSED_WIDTH where every tensor's rows are multiples of it and begin at
// multiples of 16 bytes. Else one by one, and of whatever dtype: one kernel for all of them, as each takes time to compile for every architecture.
template <class E> struct Wide {
  static constexpr int W = FUSED_WIDTH;
  WKV_MEMBER float one(const void* from, long long at) const { return load((const E*)from + at); }
  WKV_MEMBER Numbers<W> get(const void* from, long long at) const { return get_wide((const E*)from + at); }
  WKV_MEMBER void put(void* to, long long at, Numbers<W> x) const { put_wide((E*)to + at, x); }
};
struct Any {
  static constexpr int W = 1;
  int dtype;
  WKV_MEMBER float one(const void* from, long long at) const {
    if (dtype == DTYPE_FP32) return load((const fp32*)from + at);
    if (dtype == DTYPE_BF16) return load((const bf16*)from + at);
    return load((const fp16*)from + at);
  }
  WKV_MEMBER Numbers<W> get(const void* from, long long at) const { return {{one(from, at)}}; }
  WKV_MEMBER void put(void* to, long long at, Numbers<W> x) const {
    if (dtype == DTYPE_FP32) store((fp32*)to + at, x.x[0]);
    else if (dtype == DTYPE_BF16) store((bf16*)to + at, x.x[0]);
    else store((fp16*)to + at, x.x[0]);
  }
};
template <int W> WKV_FN Numbers<W> floats(const float* from, long long at) {
  if constexpr (W == 1) return {{from[at]}};
  else return get_wide((const fp32*)from + at);
}
template <int W> WKV_FN void put_floats(float* to, long long at, Numbers<W> x) {
  if constexpr (W == 1) to[at] = x.x[0];
  else put_wide((fp32*)to + at, x);
}

// ---- over the threads of a block ----

struct Add { template <class V> static WKV_MEMBER V of(V x, V y) { return x + y; } };
struct Least { template <class V> static WKV_MEMBER V of(V x, V y) { return x < y ? x : y; } };
struct Largest { template <class V> static WKV_MEMBER V of(V x, V y) { return x > y ? x : y; } };

template <class How, class V> WKV_FN V together(V x) {  // the same for every thread
  SHARED V of_warp[FUSED_ROW_THREADS / 32];
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = How::of(x, shuffle_xor(x, mask));
  if (thread_number() % 32 == 0) of_warp[thread_number() / 32] = x;
  barrier();
  x = of_warp[0];
  for (unsigned i = 1; i < block_size() / 32; i++) x = How::of(x, of_warp[i]);
  barrier();  // before the next one writes
  return x;
}

// ---- LayerNorm: a block is as wide as a row, so a thread's first W numbers are in most models all it has, and stay in registers.
// Loops over the rest are not unrolled: they would only take longer to compile ----

template <class X, class Y> WKV_FN void norm(const FusedNorm& q, X stream, Y inside) {
  constexpr int W = X::W;
  const long long row = block_number(), at = row * q.D, mine = (long long)thread_number() * W, step = (long long)block_size() * W;
  Numbers<W> held = {};
  float sum = 0, squares = 0;
  if (mine < q.D) held = stream.get(q.x, at + mine);
#pragma unroll 1
  for (long long c = mine; c < q.D; c += step) {
    const Numbers<W> x = c == mine ? held : stream.get(q.x, at + c);
    EACH sum += x.x[i];
  }
  const float mean = together<Add>(sum) / q.D;
#pragma unroll 1
  for (long long c = mine; c < q.D; c += step) {
    const Numbers<W> x = c == mine ? held : stream.get(q.x, at + c);
    EACH squares += (x.x[i] - mean) * (x.x[i] - mean);
  }
  const float scale = 1.0f / square_root(together<Add>(squares) / q.D + q.eps);
#pragma unroll 1
  for (long long c = mine; c < q.D; c += step) {
    const Numbers<W> w = floats<W>(q.w, c), b = floats<W>(q.b, c);
    Numbers<W> x = c == mine ? held : stream.get(q.x, at + c);
    EACH x.x[i] = (x.x[i] - mean) * scale * w.x[i] + b.x[i];
    inside.put(q.y, at + c, x);
  }
  if (thread_number() == 0) {
    q.stats[2 * row] = mean;
    q.stats[2 * row + 1] = scale;
  }
}

template <class X, class Y> WKV_FN void norm_gradient(const FusedNorm& q, X stream, Y inside) {
  constexpr int W = X::W;
  const long long row = block_number(), at = row * q.D, mine = (long long)thread_number() * W, step = (long long)block_size() * W;
  const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
  struct Both { Numbers<W> normal, g; };  // x as normalised, and its gradient
  const auto read = [&](long long c) {
    const Numbers<W> w = floats<W>(q.w, c);
    Both x = {stream.get(q.x, at + c), inside.get(q.gy, at + c)};
    EACH x.normal.x[i] = (x.normal.x[i] - mean) * scale;
    EACH x.g.x[i] *= w.x[i];
    return x;
  };
  Both held = {};
  float sum = 0, product = 0;
  if (mine < q.D) held = read(mine);
#pragma unroll 1
  for (long long c = mine; c < q.D; c += step) {
    const Both x = c == mine ? held : read(c);
    EACH sum += x.g.x[i];
    EACH product += x.g.x[i] * x.normal.x[i];
  }
  sum = together<Add>(sum) / q.D;
  product = together<Add>(product) / q.D;
#pragma unroll 1
  for (long long c = mine; c < q.D; c += step) {
    const Both x = c == mine ? held : read(c);
    Numbers<W> gx;
    EACH gx.x[i] = fused_norm_gradient(x.g.x[i], 1.0f, x.normal.x[i], scale, sum, product);
    stream.put(q.gx, at + c, gx);
  }
}

template <class X, class Y> WKV_FN void norm_sums(const FusedNorm& q, X stream, Y inside) {
  constexpr int W = X::W;
  const long long groups = q.D / W, slice = thread_index() / groups, c = thread_index() % groups * W;
  const long long begin = slice * q.slice, end = begin + q.slice < q.N ? begin + q.slice : q.N;
  if (begin >= q.N) return;
  Numbers<W> gw = {}, gb = {};
#pragma unroll 2
  for (long long row = begin; row < end; row++) {
    const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
    const Numbers<W> x = stream.get(q.x, row * q.D + c), gy = inside.get(q.gy, row * q.D + c);
    EACH gw.x[i] += gy.x[i] * ((x.x[i] - mean) * scale);
    EACH gb.x[i] += gy.x[i];
  }
  put_floats<W>(q.gw, slice * q.D + c, gw);
  put_floats<W>(q.gb, slice * q.D + c, gb);
}

// ---- token shift and mixing ----

#define EACH_MIX _Pragma("unroll") for (int m = 0; m < 3; m++) if (m < q.count)

struct Stretch { long long b, part, begin, end, c; };  // tokens of a row that this thread runs through, and its first channel
template <int W> WKV_FN bool find(const FusedMix& q, Stretch& at) {
  const long long groups = q.D / W, parts = (q.T + q.slice - 1) / q.slice, i = thread_index() / groups;
  at.c = thread_index() % groups * W;
  at.b = i / parts;
  at.part = i % parts;
  at.begin = at.part * q.slice;
  at.end = at.begin + q.slice < q.T ? at.begin + q.slice : q.T;
  return at.b < q.B;
}
template <class E> WKV_FN Numbers<E::W> token(const FusedMix& q, E numbers, const void* of, const Stretch& at, long long t) {
  return numbers.get(of, (at.b * q.T + t) * q.D + at.c);
}
template <class E> WKV_FN Numbers<E::W> before(const FusedMix& q, E numbers, const Stretch& at, long long t) {  // the token before t, wherever documents start
  return t ? token(q, numbers, q.x, at, t - 1) : numbers.get(q.last, at.b * q.D + at.c);
}
WKV_FN bool starts(const FusedMix& q, const Stretch& at, long long t) { return q.reset && q.reset[at.b * q.T + t]; }

template <class E> WKV_FN void mix(const FusedMix& q, E numbers) {
  constexpr int W = E::W;
  Stretch at;
  if (!find<W>(q, at)) return;
  Numbers<W> mixes[3];
  EACH_MIX mixes[m] = floats<W>(q.mix, m * q.D + at.c);
  Numbers<W> past = before(q, numbers, at, at.begin);
#pragma unroll 2
  for (long long t = at.begin; t < at.end; t++) {
    if (starts(q, at, t)) past = numbers.get(q.initial, at.b * q.D + at.c);
    const Numbers<W> x = token(q, numbers, q.x, at, t);
    EACH_MIX {
      Numbers<W> y;
      EACH y.x[i] = fused_mix(past.x[i], x.x[i], mixes[m].x[i]);
      numbers.put(q.y[m], (at.b * q.T + t) * q.D + at.c, y);
    }
    past = x;
  }
}

template <class E> WKV_FN void mix_gradient(const FusedMix& q, E numbers) {
  constexpr int W = E::W;
  Stretch at;
  if (!find<W>(q, at)) return;
  Numbers<W> mixes[3], sums[3] = {}, onward = {}, x = {};  // onward: the gradient of token t by the token after it
  EACH_MIX mixes[m] = floats<W>(q.mix, m * q.D + at.c);
  if (at.end < q.T && !starts(q, at, at.end)) EACH_MIX {
    const Numbers<W> gy = token(q, numbers, q.gy[m], at, at.end);
    EACH onward.x[i] += (1.0f - mixes[m].x[i]) * gy.x[i];
  }
  if (q.gmix) x = token(q, numbers, q.x, at, at.end - 1);
#pragma unroll 1
  for (long long t = at.end - 1; t >= at.begin; t--) {
    const bool first = starts(q, at, t);
    Numbers<W> gx = onward, past = {}, change = {};
    onward = {};
    if (q.gmix) {
      past = before(q, numbers, at, t);
      const Numbers<W> seen = first ? numbers.get(q.initial, at.b * q.D + at.c) : past;
      EACH change.x[i] = x.x[i] - seen.x[i];
    }
    EACH_MIX {
      const Numbers<W> gy = token(q, numbers, q.gy[m], at, t);
      EACH gx.x[i] += mixes[m].x[i] * gy.x[i];
      if (!first) EACH onward.x[i] += (1.0f - mixes[m].x[i]) * gy.x[i];
      EACH sums[m].x[i] += gy.x[i] * change.x[i];
    }
    numbers.put(q.gx, (at.b * q.T + t) * q.D + at.c, gx);
    x = past;
  }
  if (at.begin == 0) numbers.put(q.glast, at.b * q.D + at.c, onward);
  const long long parts = (q.T + q.slice - 1) / q.slice;
  if (q.gmix) EACH_MIX put_floats<W>(q.gmix, ((at.b * parts + at.part) * q.count + m) * q.D + at.c, sums[m]);
}

// ---- element by element ----

// Runs work(at) for this thread's W of N numbers.
template <int W, class F> WKV_FN void elements(long long N, const F& work) {
  const long long at = thread_index() * W;
  if (at < N) work(at);
}

template <class E> WKV_FN void gate(const FusedGate& q, E numbers) {
  constexpr int W = E::W;
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> r = numbers.get(q.r, at), v = numbers.get(q.v, at);
    Numbers<W> y;
    EACH y.x[i] = fused_gate(r.x[i], v.x[i]);
    numbers.put(q.y, at, y);
  });
}
template <class E> WKV_FN void gate_gradient(const FusedGate& q, E numbers) {
  constexpr int W = E::W;
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> r = numbers.get(q.r, at), v = numbers.get(q.v, at), g = numbers.get(q.g, at);
    Numbers<W> gr, gv;
    EACH fused_gate_gradient(g.x[i], r.x[i], v.x[i], gr.x[i], gv.x[i]);
    numbers.put(q.gr, at, gr);
    numbers.put(q.gv, at, gv);
  });
}

template <class E> WKV_FN void relu2(const FusedEach& q, E numbers) {
  constexpr int W = E::W;
  elements<W>(q.N, [&](long long at) {
    Numbers<W> k = numbers.get(q.k, at);
    EACH k.x[i] = fused_relu2(k.x[i]);
    numbers.put(q.y, at, k);
  });
}
template <class E> WKV_FN void relu2_gradient(const FusedEach& q, E numbers) {
  constexpr int W = E::W;
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> g = numbers.get(q.g, at);
    Numbers<W> k = numbers.get(q.k, at);
    EACH k.x[i] = fused_relu2_gradient(g.x[i], k.x[i]);
    numbers.put(q.y, at, k);
  });
}
template <class E> WKV_FN void dropout(const FusedEach& q, E numbers) {
  constexpr int W = E::W;
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> x = numbers.get(q.k, at);
    Numbers<W> y = {};
    if (q.add) y = numbers.get(q.y, at);
    EACH y.x[i] += fused_hash((unsigned)(at + i), q.seed) < q.below ? 0.0f : x.x[i] * q.scale;
    numbers.put(q.y, at, y);
  });
}

// ---- loss ----

template <class E> WKV_FN void loss(const FusedLoss& q, E numbers) {
  constexpr int W = E::W;
  const long long step = (long long)block_size() * W;
  const float infinity = as_float(0x7f800000u);
  const long long row = block_number(), at = row * q.V, target = q.target[row], mine = (long long)thread_number() * W;
  const bool valid = target >= 0 && target < q.V;  // nothing can be raised here: a target outside makes the loss NaN
  const float at_target = valid ? numbers.one(q.logits, at + target) : as_float(0x7fc00000u);
  // This thread's largest logit, the first place that has it, and the sum of e^(logit − largest).
  float best = -infinity, sum = 0;
  long long first = q.V;
  for (long long c = mine; c < q.V; c += step) {
    const Numbers<W> x = numbers.get(q.logits, at + c);
    float most = best;
    EACH if (x.x[i] > most) {
      most = x.x[i];
      first = c + i;
    }
    if (most > best) sum *= wkv_exp(best - most);
    best = most;
    EACH if (x.x[i] != -infinity) sum += wkv_exp(x.x[i] - best);
  }
  const float top = together<Largest>(best);
  const float all = together<Add>(sum * wkv_exp(best - top)), share = 1.0f / all;
  first = together<Least>(best == top ? first : q.V);
  if (thread_number() == 0) {
    q.stats[3 * row] = top;
    q.stats[3 * row + 1] = all;
    q.stats[3 * row + 2] = at_target;
  }
  if (!q.gradient) return;
  // softmax, then −1 at the target and L2Wrap's pull at the largest logit, each added before it is rounded
  for (long long c = mine; c < q.V; c += step) {
    Numbers<W> x = numbers.get(q.logits, at + c);
    EACH {
      x.x[i] = wkv_exp(x.x[i] - top) * share;
      if (c + i == target) x.x[i] -= 1.0f;
      if (c + i == first) x.x[i] += top * q.pull;
    }
    numbers.put(q.logits, at + c, x);
  }
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
  KERNEL(FUSED_ROW_THREADS) fused_loss_##name(const FusedLoss q) { loss(q, E); }
OF_TWO(fp32, Wide<fp32>{}, Wide<fp32>{})
OF_TWO(bf16, Wide<bf16>{}, Wide<bf16>{})
OF_TWO(fp16, Wide<fp16>{}, Wide<fp16>{})
OF_TWO(fp32_bf16, Wide<fp32>{}, Wide<bf16>{})
OF_TWO(fp32_fp16, Wide<fp32>{}, Wide<fp16>{})
OF_TWO(any, Any{q.stream}, Any{q.inside})
OF_ONE(fp32, Wide<fp32>{})
OF_ONE(bf16, Wide<bf16>{})
OF_ONE(fp16, Wide<fp16>{})
OF_ONE(any, Any{q.dtype})

}  // namespace fused
