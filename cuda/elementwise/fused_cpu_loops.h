// The elementwise loops over rows and channels, written once for vectors of WKV_BYTES bytes; see
// fused_cpu.h and cpu_*.cpp.
#include "elementwise/fused_cpu.h"
#include "common/cpu_block.h"

namespace {

#include "elementwise/fused.h"

struct Full { static constexpr bool value = true; };
struct Partial { static constexpr bool value = false; };

// Calls work(full, c, n) for blocks of channels; Partial if fewer than BLOCK are left.
template <class F> WKV_FN void blocks(int64_t begin, int64_t end, const F& work) {
  int64_t c = begin;
  for (; c + BLOCK <= end; c += BLOCK) work(Full{}, c, BLOCK);
  if (c < end) work(Partial{}, c, end - c);
}
#define EACH_BLOCK(begin, end) blocks(begin, end, [&](auto full, int64_t c, int64_t n) __attribute__((always_inline)) {
#define END_BLOCK });
#define GET(from) load<O, decltype(full)::value>(from, n)
#define PUT(to, x) store<O, decltype(full)::value>(to, x, n)

// Blocks are in bf16 order if any of the tensors is bf16.
template <class X, class Y> struct OrderOf { using type = bf16; };
template <> struct OrderOf<float, float> { using type = float; };
template <class O> WKV_FN wkv_bits lane_indices(int g) {  // of elements within a block
  wkv_bits at;
  for (int i = 0; i < LANES; i++) at[i] = sizeof(O) == 2 ? 2 * i + g : i + g * LANES;
  return at;
}

WKV_FN float total(Block x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x.g[0][i] + x.g[1][i];
  return sum;
}
template <class O, bool FULL> WKV_FN Block zero_tail(Block x, int64_t n) {  // sets all but the first n to 0
  if (!FULL) EACH_GROUP x.g[g] = lane_indices<O>(g) < uint32_t(n) ? x.g[g] : wkv_float{};
  return x;
}
#define ZERO_TAIL(x) zero_tail<O, decltype(full)::value>(x, n)

template <class X, class Y> void norm(const FusedNorm& q, int64_t begin, int64_t end) {
  using O = typename OrderOf<X, Y>::type;
  const int64_t D = q.D;
  for (int64_t row = begin; row < end; row++) {
    const X* x_ = static_cast<const X*>(q.x) + row * D;
    Y* y_ = static_cast<Y*>(q.y) + row * D;
    Block sum = {}, squares = {};
    EACH_BLOCK(0, D)
      const Block x = GET(x_ + c);
      EACH_GROUP sum.g[g] += x.g[g];
    END_BLOCK
    const float mean = total(sum) / D;
    EACH_BLOCK(0, D)
      Block x = GET(x_ + c);
      EACH_GROUP x.g[g] -= mean;
      x = ZERO_TAIL(x);
      EACH_GROUP squares.g[g] += x.g[g] * x.g[g];
    END_BLOCK
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / D + q.eps);
    q.stats[2 * row] = mean;
    q.stats[2 * row + 1] = scale;
    EACH_BLOCK(0, D)
      const Block w = GET(q.w + c), b = GET(q.b + c);
      Block x = GET(x_ + c);
      EACH_GROUP x.g[g] = (x.g[g] - mean) * scale * w.g[g] + b.g[g];
      PUT(y_ + c, x);
    END_BLOCK
  }
}

template <class X, class Y> void norm_gradient(const FusedNorm& q, int64_t begin, int64_t end) {
  using O = typename OrderOf<X, Y>::type;
  const int64_t D = q.D;
  for (int64_t row = begin; row < end; row++) {
    const X* x_ = static_cast<const X*>(q.x) + row * D;
    const Y* gy_ = static_cast<const Y*>(q.gy) + row * D;
    X* gx_ = static_cast<X*>(q.gx) + row * D;
    const float mean = q.stats[2 * row], scale = q.stats[2 * row + 1];
    Block sum = {}, product = {};
    EACH_BLOCK(0, D)
      const Block w = GET(q.w + c), x = GET(x_ + c), gy = GET(gy_ + c);
      EACH_GROUP {
        const wkv_float g1 = gy.g[g] * w.g[g];
        sum.g[g] += g1;
        product.g[g] += g1 * ((x.g[g] - mean) * scale);
      }
      if (q.gw) {
        Block gw = GET(q.gw + c), gb = GET(q.gb + c);
        EACH_GROUP {
          gw.g[g] += gy.g[g] * ((x.g[g] - mean) * scale);
          gb.g[g] += gy.g[g];
        }
        PUT(q.gw + c, gw);
        PUT(q.gb + c, gb);
      }
    END_BLOCK
    const float sums = total(sum) / D, products = total(product) / D;
    EACH_BLOCK(0, D)
      const Block w = GET(q.w + c), x = GET(x_ + c), gy = GET(gy_ + c);
      Block gx;
      EACH_GROUP {
        const wkv_float normal = (x.g[g] - mean) * scale;
        gx.g[g] = fused_norm_gradient(gy.g[g], w.g[g], normal, wkv_float{} + scale, wkv_float{} + sums,
                                      wkv_float{} + products);
      }
      PUT(gx_ + c, gx);
    END_BLOCK
  }
}

WKV_FN bool starts(const FusedMix& q, int64_t row) { return q.reset && q.reset[row]; }
// The previous token: a row of x, `last`, or `initial` at a document start.
template <class E> WKV_FN const E* before(const FusedMix& q, int64_t row) {
  if (starts(q, row)) return static_cast<const E*>(q.initial) + row / q.T * q.D;
  return row % q.T ? static_cast<const E*>(q.x) + (row - 1) * q.D : static_cast<const E*>(q.last) + row / q.T * q.D;
}

template <class E, int COUNT> WKV_FN void mix_rows(const FusedMix& q, int64_t begin, int64_t end) {
  using O = E;
  for (int64_t row = begin; row < end; row++) {
    const E *x_ = static_cast<const E*>(q.x) + row * q.D, *past_ = before<E>(q, row);
    EACH_BLOCK(0, q.D)
      const Block x = GET(x_ + c), past = GET(past_ + c);
      for (int i = 0; i < COUNT; i++) {
        const Block m = GET(q.mix + i * q.D + c);
        Block y;
        EACH_GROUP y.g[g] = fused_mix(past.g[g], x.g[g], m.g[g]);
        PUT(static_cast<E*>(q.y[i]) + row * q.D + c, y);
      }
    END_BLOCK
  }
}

template <class E, int COUNT> WKV_FN void mix_gradient_rows(const FusedMix& q, int64_t begin, int64_t end) {
  using O = E;
  for (int64_t row = begin; row < end; row++) {
    const E *x_ = static_cast<const E*>(q.x) + row * q.D, *past_ = before<E>(q, row);
    E *gx_ = static_cast<E*>(q.gx) + row * q.D,
      *glast_ = row % q.T ? nullptr : static_cast<E*>(q.glast) + row / q.T * q.D;
    const bool last = (row + 1) % q.T == 0, next = !last && !starts(q, row + 1);  // the next token mixed this one in
    EACH_BLOCK(0, q.D)
      const Block x = GET(x_ + c), past = GET(past_ + c);
      Block gx = {}, glast = {};
      for (int i = 0; i < COUNT; i++) {
        const Block m = GET(q.mix + i * q.D + c), gy = GET(static_cast<const E*>(q.gy[i]) + row * q.D + c);
        EACH_GROUP gx.g[g] += m.g[g] * gy.g[g];
        if (next) {
          const Block after = GET(static_cast<const E*>(q.gy[i]) + (row + 1) * q.D + c);
          EACH_GROUP gx.g[g] += (1.0f - m.g[g]) * after.g[g];
        }
        if (glast_ && !starts(q, row)) EACH_GROUP glast.g[g] += (1.0f - m.g[g]) * gy.g[g];
        if (q.gmix) {
          Block gm = GET(q.gmix + i * q.D + c);
          EACH_GROUP gm.g[g] += gy.g[g] * (x.g[g] - past.g[g]);
          PUT(q.gmix + i * q.D + c, gm);
        }
      }
      PUT(gx_ + c, gx);
      if (glast_) PUT(glast_ + c, glast);
    END_BLOCK
  }
}

template <class E> void mix(const FusedMix& q, int64_t begin, int64_t end) {
  if (q.count == 1) mix_rows<E, 1>(q, begin, end);
  else if (q.count == 2) mix_rows<E, 2>(q, begin, end);
  else mix_rows<E, 3>(q, begin, end);
}
template <class E> void mix_gradient(const FusedMix& q, int64_t begin, int64_t end) {
  if (q.count == 1) mix_gradient_rows<E, 1>(q, begin, end);
  else if (q.count == 2) mix_gradient_rows<E, 2>(q, begin, end);
  else mix_gradient_rows<E, 3>(q, begin, end);
}

template <class E> void gate(const FusedGate& q, int64_t begin, int64_t end) {
  using O = E;
  EACH_BLOCK(begin, end)
    const Block r = GET(static_cast<const E*>(q.r) + c), v = GET(static_cast<const E*>(q.v) + c);
    Block y;
    EACH_GROUP y.g[g] = fused_gate(r.g[g], v.g[g]);
    PUT(static_cast<E*>(q.y) + c, y);
  END_BLOCK
}

template <class E> void gate_gradient(const FusedGate& q, int64_t begin, int64_t end) {
  using O = E;
  EACH_BLOCK(begin, end)
    const Block r = GET(static_cast<const E*>(q.r) + c), v = GET(static_cast<const E*>(q.v) + c);
    const Block gy = GET(static_cast<const E*>(q.g) + c);
    Block gr, gv;
    EACH_GROUP fused_gate_gradient(gy.g[g], r.g[g], v.g[g], gr.g[g], gv.g[g]);
    PUT(static_cast<E*>(q.gr) + c, gr);
    PUT(static_cast<E*>(q.gv) + c, gv);
  END_BLOCK
}

template <class E> void relu2(const void* k_, void* y_, int64_t begin, int64_t end) {
  using O = E;
  EACH_BLOCK(begin, end)
    Block k = GET(static_cast<const E*>(k_) + c);
    EACH_GROUP k.g[g] = fused_relu2(k.g[g]);
    PUT(static_cast<E*>(y_) + c, k);
  END_BLOCK
}

template <class E> void relu2_gradient(const void* g_, const void* k_, void* gk_, int64_t begin, int64_t end) {
  using O = E;
  EACH_BLOCK(begin, end)
    const Block k = GET(static_cast<const E*>(k_) + c), gy = GET(static_cast<const E*>(g_) + c);
    Block gk;
    EACH_GROUP gk.g[g] = fused_relu2_gradient(gy.g[g], k.g[g]);
    PUT(static_cast<E*>(gk_) + c, gk);
  END_BLOCK
}

template <class E>
void dropout(const void* x_, void* y_, bool add, uint32_t seed, uint32_t below, float scale, int64_t begin,
             int64_t end) {
  using O = E;
  EACH_BLOCK(begin, end)
    const Block x = GET(static_cast<const E*>(x_) + c);
    Block y = {};
    if (add) y = GET(static_cast<const E*>(y_) + c);
    EACH_GROUP y.g[g] += fused_hash(lane_indices<E>(g) + uint32_t(c), seed) < below ? wkv_float{} : x.g[g] * scale;
    PUT(static_cast<E*>(y_) + c, y);
  END_BLOCK
}

WKV_FN float load_one(const float* x) { return *x; }
WKV_FN float load_one(const bf16* x) {
  const uint32_t bits = uint32_t(x->bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

// The first index of the row's maximum, or -1 if it is NaN.
template <class E> WKV_FN int64_t index_of(float top, const E* x_, int64_t V) {
  using O = E;
  for (int64_t c = 0; c < V; c += BLOCK) {
    const int64_t n = V - c < BLOCK ? V - c : BLOCK;
    const Block x = n == BLOCK ? load<O, true>(x_ + c, n) : load<O, false>(x_ + c, n);
    if (all((x.g[0] != top) & (x.g[1] != top))) continue;
    for (int64_t i = c; i < c + n; i++)
      if (load_one(x_ + i) == top) return i;
  }
  return -1;
}

template <class E> void loss(const FusedLoss& q, float* exps, int64_t begin, int64_t end) {
  using O = E;
  for (int64_t row = begin; row < end; row++) {
    E* x_ = static_cast<E*>(q.logits) + row * q.stride;
    Block best, sum = {};
    EACH_GROUP best.g[g] = wkv_float{} - __builtin_inff();
    EACH_BLOCK(0, q.V)
      Block x = canonical_nan(GET(x_ + c));
      if (!decltype(full)::value)
        EACH_GROUP x.g[g] = lane_indices<O>(g) < uint32_t(n) ? x.g[g] : wkv_float{} - __builtin_inff();
      EACH_GROUP best.g[g] = wkv_max(best.g[g], x.g[g]);
    END_BLOCK
    float top = best.g[0][0];
    EACH_GROUP for (int i = 0; i < LANES; i++) top = top > best.g[g][i] ? top : best.g[g][i];
    EACH_BLOCK(0, q.V)
      Block x = canonical_nan(GET(x_ + c));
      EACH_GROUP x.g[g] = wkv_exp(x.g[g] - top);
      x = ZERO_TAIL(x);
      EACH_GROUP {
        sum.g[g] += x.g[g];
        write(exps + c + g * LANES, x.g[g], LANES);  // in block order, without tail
      }
    END_BLOCK
    const float all = total(sum), share = 1.0f / all;
    float* stats = q.stats + 3 * row;
    stats[0] = top;
    stats[1] = all;
    stats[2] = load_one(x_ + q.target[row]);
    if (!q.gradient) continue;
    const int64_t first = index_of(top, x_, q.V);
    EACH_BLOCK(0, q.V)
      Block x;
      EACH_GROUP {
        read(x.g[g], exps + c + g * LANES, LANES);
        x.g[g] *= share;
      }
      PUT(x_ + c, x);
    END_BLOCK
    // softmax, −1 at the target, and L2Wrap's term at the largest logit; rounded once
    const float at_target = __builtin_expf(stats[2] - top) * share - 1.0f, l2wrap = top * q.l2wrap;
    const auto set = [&](int64_t c, float x) {
      Block b = {};
      b.g[0][0] = x;
      store<E, false>(x_ + c, b, 1);
    };
    set(q.target[row], at_target + (first == q.target[row] ? l2wrap : 0.0f));
    if (first >= 0 && first != q.target[row]) set(first, share + l2wrap);
  }
}

#include "elementwise/adam_cpu_loops.h"

}  // namespace

#define THREE(f) {f<float, float>, f<bf16, bf16>, f<float, bf16>}
#define TWO(f) {f<float>, f<bf16>}
const FusedLoops LOOPS(fused) = {
    BLOCK,     THREE(norm),        THREE(norm_gradient), TWO(mix),     TWO(mix_gradient),
    TWO(gate), TWO(gate_gradient), TWO(relu2),           TWO(relu2_gradient), TWO(dropout),
    TWO(loss), adam};
