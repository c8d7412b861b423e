// The CUDA unit's fused operations: what fused_cpu_loops.h is on CPUs. A thread takes FUSED_WIDTH neighbouring numbers at a time, 16 bytes to an access,
// or one by one where a tensor does not allow it. Arithmetic is in fp32 whatever the tensors are.
//
// norm       a block per row, which stays in registers up to 8192 channels. Sums within a row go lane by lane, then warp by warp
// norm_sums  the gradients of w and b: a thread per 8 channels and slice of rows
// mix        a thread per 8 channels and slice of time: the token before is the one it has just had. Its gradient runs against time
// loss       a block per row of logits: once for the largest and the sum, once more for the gradient in their place
// the rest   element by element
//
// Nothing is added atomically and every sum has a fixed order: the same bits twice. No thread's memory grows with a size.
#include "device.h"
#include "fused_args.h"

namespace fused {

#include "fused.h"

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

// W numbers from a place of a tensor. W is FUSED_WIDTH where every tensor's rows are multiples of it and begin at multiples of 16 bytes, else 1.
template <class E, int W> WKV_FN Numbers<W> get(const void* from, long long at) {
  const E* p = (const E*)from + at;
  if constexpr (W == 1) return {{load(p)}};
  else return get_wide(p);
}
template <class E, int W> WKV_FN void put(void* to, long long at, Numbers<W> x) {
  E* p = (E*)to + at;
  if constexpr (W == 1) store(p, x.x[0]);
  else put_wide(p, x);
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

// ---- LayerNorm: a block is as wide as a row, so a thread's first W numbers are in most models all it has, and stay in registers ----

template <class X, class Y, int W> WKV_FN void norm(const FusedNorm& q) {
  const long long row = block_number(), at = row * q.D, mine = (long long)thread_number() * W, step = (long long)block_size() * W;
  Numbers<W> held = {};
  float sum = 0, squares = 0;
  if (mine < q.D) held = get<X, W>(q.x, at + mine);
  for (long long c = mine; c < q.D; c += step) {
    const Numbers<W> x = c == mine ? held : get<X, W>(q.x, at + c);
    EACH sum += x.x[i];
  }
  const float mean = together<Add>(sum) / q.D;
  for (long long c = mine; c < q.D; c += step) {
    const Numbers<W> x = c == mine ? held : get<X, W>(q.x, at + c);
    EACH squares += (x.x[i] - mean) * (x.x[i] - mean);
  }
  const float scale = 1.0f / square_root(together<Add>(squares) / q.D + q.eps);
  for (long long c = mine; c < q.D; c += step) {
    const Numbers<W> w = get<fp32, W>(q.w, c), b = get<fp32, W>(q.b, c);
    Numbers<W> x = c == mine ? held : get<X, W>(q.x, at + c);
    EACH x.x[i] = (x.x[i] - mean) * scale * w.x[i] + b.x[i];
    put<Y, W>(q.y, at + c, x);
  }
  if (thread_number() == 0) {
    q.stats[2 * row] = mean;
    q.stats[2 * row + 1] = scale;
  }
}

template <class X, class Y, int W> WKV_FN void norm_gradient(const FusedNorm& q) {
  const long long row = block_number(), at = row * q.D, mine = (long long)thread_number() * W, step = (long long)block_size() * W;
  const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
  struct Both { Numbers<W> normal, g; };  // x as normalised, and its gradient
  const auto read = [&](long long c) {
    const Numbers<W> w = get<fp32, W>(q.w, c);
    Both x = {get<X, W>(q.x, at + c), get<Y, W>(q.gy, at + c)};
    EACH x.normal.x[i] = (x.normal.x[i] - mean) * scale;
    EACH x.g.x[i] *= w.x[i];
    return x;
  };
  Both held = {};
  float sum = 0, product = 0;
  if (mine < q.D) held = read(mine);
  for (long long c = mine; c < q.D; c += step) {
    const Both x = c == mine ? held : read(c);
    EACH sum += x.g.x[i];
    EACH product += x.g.x[i] * x.normal.x[i];
  }
  sum = together<Add>(sum) / q.D;
  product = together<Add>(product) / q.D;
  for (long long c = mine; c < q.D; c += step) {
    const Both x = c == mine ? held : read(c);
    Numbers<W> gx = {};
    if (q.past) gx = get<X, W>(q.past, at + c);
    EACH gx.x[i] += fused_norm_gradient(x.g.x[i], 1.0f, x.normal.x[i], scale, sum, product);
    put<X, W>(q.gx, at + c, gx);
  }
}

template <class X, class Y, int W> WKV_FN void norm_sums(const FusedNorm& q) {
  const long long groups = q.D / W, slice = thread_index() / groups, c = thread_index() % groups * W;
  const long long begin = slice * q.slice, end = begin + q.slice < q.N ? begin + q.slice : q.N;
  if (begin >= q.N) return;
  Numbers<W> gw = {}, gb = {};
#pragma unroll 2
  for (long long row = begin; row < end; row++) {
    const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
    const Numbers<W> x = get<X, W>(q.x, row * q.D + c), gy = get<Y, W>(q.gy, row * q.D + c);
    EACH gw.x[i] += gy.x[i] * ((x.x[i] - mean) * scale);
    EACH gb.x[i] += gy.x[i];
  }
  put<fp32, W>(q.gw, slice * q.D + c, gw);
  put<fp32, W>(q.gb, slice * q.D + c, gb);
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
template <class E, int W> WKV_FN Numbers<W> token(const FusedMix& q, const void* of, const Stretch& at, long long t) {
  return get<E, W>(of, (at.b * q.T + t) * q.D + at.c);
}
template <class E, int W> WKV_FN Numbers<W> before(const FusedMix& q, const Stretch& at, long long t) {  // the token before t, wherever documents start
  return t ? token<E, W>(q, q.x, at, t - 1) : get<E, W>(q.last, at.b * q.D + at.c);
}
WKV_FN bool starts(const FusedMix& q, const Stretch& at, long long t) { return q.reset && q.reset[at.b * q.T + t]; }

template <class E, int W> WKV_FN void mix(const FusedMix& q) {
  Stretch at;
  if (!find<W>(q, at)) return;
  Numbers<W> mixes[3];
  EACH_MIX mixes[m] = get<fp32, W>(q.mix, m * q.D + at.c);
  Numbers<W> past = before<E, W>(q, at, at.begin);
#pragma unroll 2
  for (long long t = at.begin; t < at.end; t++) {
    if (starts(q, at, t)) past = {};
    const Numbers<W> x = token<E, W>(q, q.x, at, t);
    EACH_MIX {
      Numbers<W> y;
      EACH y.x[i] = fused_mix(past.x[i], x.x[i], mixes[m].x[i]);
      put<E, W>(q.y[m], (at.b * q.T + t) * q.D + at.c, y);
    }
    past = x;
  }
}

template <class E, int W> WKV_FN void mix_gradient(const FusedMix& q) {
  Stretch at;
  if (!find<W>(q, at)) return;
  Numbers<W> mixes[3], sums[3] = {}, onward = {}, x = {};  // onward: the gradient of token t by the token after it
  EACH_MIX mixes[m] = get<fp32, W>(q.mix, m * q.D + at.c);
  if (at.end < q.T && !starts(q, at, at.end)) EACH_MIX {
    const Numbers<W> gy = token<E, W>(q, q.gy[m], at, at.end);
    EACH onward.x[i] += (1.0f - mixes[m].x[i]) * gy.x[i];
  }
  if (q.gmix) x = token<E, W>(q, q.x, at, at.end - 1);
#pragma unroll 1
  for (long long t = at.end - 1; t >= at.begin; t--) {
    const bool first = starts(q, at, t);
    Numbers<W> gx = onward, past = {}, change = {};
    onward = {};
    if (q.gmix) {
      past = before<E, W>(q, at, t);
      EACH change.x[i] = x.x[i] - (first ? 0.0f : past.x[i]);
    }
    EACH_MIX {
      const Numbers<W> gy = token<E, W>(q, q.gy[m], at, t);
      EACH gx.x[i] += mixes[m].x[i] * gy.x[i];
      if (!first) EACH onward.x[i] += (1.0f - mixes[m].x[i]) * gy.x[i];
      EACH sums[m].x[i] += gy.x[i] * change.x[i];
    }
    put<E, W>(q.gx, (at.b * q.T + t) * q.D + at.c, gx);
    x = past;
  }
  if (at.begin == 0) put<E, W>(q.glast, at.b * q.D + at.c, onward);
  const long long parts = (q.T + q.slice - 1) / q.slice;
  if (q.gmix) EACH_MIX put<fp32, W>(q.gmix, ((at.b * parts + at.part) * q.count + m) * q.D + at.c, sums[m]);
}

// ---- element by element ----

// Runs work(at) for this thread's W of N numbers.
template <int W, class F> WKV_FN void elements(long long N, const F& work) {
  const long long at = thread_index() * W;
  if (at < N) work(at);
}

template <class X, class Y, int W> WKV_FN void gate(const FusedGate& q) {
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> r = get<Y, W>(q.r, at), v = get<Y, W>(q.v, at);
    Numbers<W> y = {};
    if (q.x) y = get<X, W>(q.x, at);
    EACH y.x[i] += fused_gate(r.x[i], v.x[i]);
    if (q.x) put<X, W>(q.y, at, y);
    else put<Y, W>(q.y, at, y);
  });
}
template <class X, class Y, int W> WKV_FN void gate_gradient(const FusedGate& q) {
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> r = get<Y, W>(q.r, at), v = get<Y, W>(q.v, at), g = get<X, W>(q.g, at);
    Numbers<W> gr, gv;
    EACH fused_gate_gradient(g.x[i], r.x[i], v.x[i], gr.x[i], gv.x[i]);
    put<Y, W>(q.gr, at, gr);
    put<Y, W>(q.gv, at, gv);
  });
}

template <class E, int W> WKV_FN void relu2(const FusedEach& q) {
  elements<W>(q.N, [&](long long at) {
    Numbers<W> k = get<E, W>(q.k, at);
    EACH k.x[i] = fused_relu2(k.x[i]);
    put<E, W>(q.y, at, k);
  });
}
template <class E, int W> WKV_FN void relu2_gradient(const FusedEach& q) {
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> g = get<E, W>(q.g, at);
    Numbers<W> k = get<E, W>(q.k, at);
    EACH k.x[i] = fused_relu2_gradient(g.x[i], k.x[i]);
    put<E, W>(q.y, at, k);
  });
}
template <class E, int W> WKV_FN void dropout(const FusedEach& q) {
  elements<W>(q.N, [&](long long at) {
    const Numbers<W> x = get<E, W>(q.k, at);
    Numbers<W> y = {};
    if (q.add) y = get<E, W>(q.y, at);
    EACH y.x[i] += fused_hash((unsigned)(at + i), q.seed) < q.below ? 0.0f : x.x[i] * q.scale;
    put<E, W>(q.y, at, y);
  });
}

// ---- loss ----

template <class E, int W> WKV_FN void loss(const FusedLoss& q) {
  const long long step = (long long)block_size() * W;
  const float infinity = as_float(0x7f800000u);
  const long long row = block_number(), at = row * q.V, target = q.target[row], mine = (long long)thread_number() * W;
  const bool valid = target >= 0 && target < q.V;  // nothing can be raised here: a target outside makes the loss NaN
  const float at_target = valid ? load((const E*)q.logits + at + target) : as_float(0x7fc00000u);
  // This thread's largest logit, the first place that has it, and the sum of e^(logit − largest).
  float best = -infinity, sum = 0;
  long long first = q.V;
  for (long long c = mine; c < q.V; c += step) {
    const Numbers<W> x = get<E, W>(q.logits, at + c);
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
    Numbers<W> x = get<E, W>(q.logits, at + c);
    EACH {
      x.x[i] = wkv_exp(x.x[i] - top) * share;
      if (c + i == target) x.x[i] -= 1.0f;
      if (c + i == first) x.x[i] += top * q.pull;
    }
    put<E, W>(q.logits, at + c, x);
  }
}

// ---- kernels, by dtype or by the dtypes of stream and inside ----

#define RUN(function, ...) (q.wide ? function<__VA_ARGS__, FUSED_WIDTH>(q) : function<__VA_ARGS__, 1>(q))
#define OF_TWO(X, Y, name)                                                                              \
  KERNEL(FUSED_ROW_THREADS) fused_norm_##name(const FusedNorm q) { RUN(norm, X, Y); }                       \
  KERNEL(FUSED_ROW_THREADS) fused_norm_gradient_##name(const FusedNorm q) { RUN(norm_gradient, X, Y); }     \
  KERNEL(FUSED_THREADS) fused_norm_sums_##name(const FusedNorm q) { RUN(norm_sums, X, Y); }             \
  KERNEL(FUSED_THREADS) fused_gate_##name(const FusedGate q) { RUN(gate, X, Y); }                       \
  KERNEL(FUSED_THREADS) fused_gate_gradient_##name(const FusedGate q) { RUN(gate_gradient, X, Y); }
#define OF_ONE(E)                                                                                       \
  OF_TWO(E, E, E)                                                                                       \
  KERNEL(FUSED_THREADS) fused_mix_##E(const FusedMix q) { RUN(mix, E); }                                \
  KERNEL(FUSED_THREADS, 4) fused_mix_gradient_##E(const FusedMix q) { RUN(mix_gradient, E); }           \
  KERNEL(FUSED_THREADS) fused_relu2_##E(const FusedEach q) { RUN(relu2, E); }                           \
  KERNEL(FUSED_THREADS) fused_relu2_gradient_##E(const FusedEach q) { RUN(relu2_gradient, E); }         \
  KERNEL(FUSED_THREADS) fused_dropout_##E(const FusedEach q) { RUN(dropout, E); }                       \
  KERNEL(FUSED_ROW_THREADS) fused_loss_##E(const FusedLoss q) { RUN(loss, E); }
OF_ONE(fp32)
OF_ONE(bf16)
OF_ONE(fp16)
OF_TWO(fp32, bf16, fp32_bf16)
OF_TWO(fp32, fp16, fp32_fp16)

}  // namespace fused
