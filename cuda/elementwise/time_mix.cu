// CUDA kernels of the time-mix of RWKV-5 to 7 around WKV (formulas: time_mix.h). A warp has one head
// of up to 64 elements, two per thread, and `slice` consecutive tokens, so that sums over a head are
// shuffles, and the gradients of parameters are summed in registers and then over slices, in a fixed
// order. Arithmetic is fp32 for every dtype. Included after fused.cu.
#include "elementwise/time_mix_args.h"

namespace fused {

#include "elementwise/time_mix.h"

template <class E> struct alignas(2 * sizeof(E)) Two { E x[2]; };
struct Pair { float x[2]; };
#define EACH_OF_2 _Pragma("unroll") for (int i = 0; i < 2; i++)

// Zeros if `from` is null or the thread has no elements there.
template <class E> WKV_FN Pair load_pair(const void* from, long long at, bool valid) {
  Pair x = {};
  if (from && valid) {
    const Two<E> two = *(const Two<E>*)((const E*)from + at);
    EACH_OF_2 x.x[i] = load(&two.x[i]);
  }
  return x;
}
template <class E> WKV_FN void store_pair(void* to, long long at, bool valid, const Pair& x) {
  if (!valid || !to) return;
  Two<E> two;
  EACH_OF_2 store(&two.x[i], x.x[i]);
  *(Two<E>*)((E*)to + at) = two;
}
WKV_FN float head_sum(float x) {
  _Pragma("unroll") for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

struct HeadPlace {
  long long begin, channel;  // first token; first of the thread's channels, head * N + element
  long long channels, slice_number;
  bool has_elements;
};
WKV_FN HeadPlace head_place(const TimeMixShape& q) {
  const long long warp = thread_index() / 32, element = thread_index() % 32 * 2;
  HeadPlace p;
  p.slice_number = warp / q.H;
  p.begin = p.slice_number * q.slice;
  p.channel = warp % q.H * q.N + element;
  p.channels = q.H * q.N;
  p.has_elements = element < q.N && p.begin < q.tokens;
  return p;
}
// Writes the sums over a slice for COUNT parameters, [slices, COUNT, channels]; nothing if `to` is null.
template <int COUNT> WKV_FN void store_sums(float* to, const HeadPlace& p, const float (&sums)[COUNT][2]) {
  if (!to || !p.has_elements) return;
  to += p.slice_number * COUNT * p.channels + p.channel;
  _Pragma("unroll") for (int n = 0; n < COUNT; n++) EACH_OF_2 to[n * p.channels + i] = sums[n][i];
}

WKV_FN TimeMixKeysParameters keys_parameters(const KeysArgs& q, const HeadPlace& p, int i) {
  if (!p.has_elements) return {};
  const long long at = p.channel + i;
  return {q.w0[at], q.a0[at], q.v0 ? q.v0[at] : 0, q.k_k[at], q.k_a[at]};
}
// The inputs of two elements, and the head's 1 / max(‖k'·k_k‖, 1e-12). Returns whether it is 1 / ‖k'·k_k‖.
template <class E>
WKV_FN bool keys_inputs(const KeysArgs& q, long long at, bool valid, const TimeMixKeysParameters (&parameters)[2],
                        TimeMixKeysInputs (&x)[2], float& inverse) {
  const Pair k = load_pair<E>(q.k, at, valid), v = load_pair<E>(q.v, at, valid), w = load_pair<E>(q.w, at, valid),
             a = load_pair<E>(q.a, at, valid), mix = load_pair<E>(q.mix, at, valid), first = load_pair<E>(q.first, at, valid);
  float squares = 0;
  EACH_OF_2 {
    x[i] = {k.x[i], v.x[i], w.x[i], a.x[i], mix.x[i], first.x[i]};
    const float scaled = k.x[i] * parameters[i].k_k;
    squares += scaled * scaled;
  }
  const float length = square_root(head_sum(squares));
  inverse = 1.0f / (length > 1e-12f ? length : length == length ? 1e-12f : length);
  return !(length <= 1e-12f);
}

template <class E> WKV_FN void keys(const KeysArgs& q) {
  const HeadPlace p = head_place(q.shape);
  TimeMixKeysParameters parameters[2];
  EACH_OF_2 parameters[i] = keys_parameters(q, p, i);
  for (long long n = 0; n < q.shape.slice; n++) {
    const bool valid = p.has_elements && p.begin + n < q.shape.tokens;
    const long long at = (p.begin + n) * p.channels + p.channel;
    TimeMixKeysInputs x[2];
    float inverse;
    keys_inputs<E>(q, at, valid, parameters, x, inverse);
    Pair w, k, v, a, b;
    EACH_OF_2 {
      const TimeMixKeys y = time_mix_keys(x[i], parameters[i], inverse, q.mix != nullptr);
      w.x[i] = y.w;
      k.x[i] = y.k;
      v.x[i] = y.v;
      a.x[i] = -y.removal;
      b.x[i] = y.removal * y.rate;
    }
    store_pair<fp32>(q.w_out, at, valid, w);
    store_pair<E>(q.k_out, at, valid, k);
    store_pair<E>(q.v_out, at, valid, v);
    store_pair<E>(q.a_out, at, valid, a);
    store_pair<E>(q.b_out, at, valid, b);
  }
}

template <class E> WKV_FN void keys_gradient(const KeysArgs& q) {
  const HeadPlace p = head_place(q.shape);
  const bool later = q.mix != nullptr;
  TimeMixKeysParameters parameters[2], sums[2] = {};
  EACH_OF_2 parameters[i] = keys_parameters(q, p, i);
  for (long long n = 0; n < q.shape.slice; n++) {
    const bool valid = p.has_elements && p.begin + n < q.shape.tokens;
    const long long at = (p.begin + n) * p.channels + p.channel;
    TimeMixKeysInputs x[2], gx[2];
    TimeMixKeysGradients g[2];
    TimeMixKeys y[2];
    float inverse, product = 0;
    const bool normalised = keys_inputs<E>(q, at, valid, parameters, x, inverse);
    const Pair gw = load_pair<fp32>(q.gw, at, valid), ga = load_pair<E>(q.ga, at, valid), gb = load_pair<E>(q.gb, at, valid);
    const Pair gk0 = load_pair<E>(q.gk[0], at, valid), gk1 = load_pair<E>(q.gk[1], at, valid);
    const Pair gv0 = load_pair<E>(q.gv[0], at, valid), gv1 = load_pair<E>(q.gv[1], at, valid);
    EACH_OF_2 {
      g[i] = {gw.x[i], gk0.x[i] + gk1.x[i], gv0.x[i] + gv1.x[i], ga.x[i], gb.x[i]};
      y[i] = time_mix_keys(x[i], parameters[i], inverse, later);
      product += y[i].removal * time_mix_removal_gradient(g[i], y[i]);
    }
    product = head_sum(product);
    Pair k, v, w, a, mix, first;
    EACH_OF_2 {
      TimeMixKeysParameters gp;
      time_mix_keys_gradient(g[i], x[i], parameters[i], y[i], inverse, normalised ? product : 0, later, gx[i], gp);
      if (valid) {
        sums[i].w0 += gp.w0;
        sums[i].a0 += gp.a0;
        sums[i].v0 += gp.v0;
        sums[i].k_k += gp.k_k;
        sums[i].k_a += gp.k_a;
      }
      k.x[i] = gx[i].k;
      v.x[i] = gx[i].v;
      w.x[i] = gx[i].w;
      a.x[i] = gx[i].a;
      mix.x[i] = gx[i].mix;
      first.x[i] = gx[i].first;
    }
    store_pair<E>(q.gk_in, at, valid, k);
    store_pair<E>(q.gv_in, at, valid, v);
    store_pair<E>(q.gw_in, at, valid, w);
    store_pair<E>(q.ga_in, at, valid, a);
    store_pair<E>(q.gmix, at, valid, mix);
    store_pair<E>(q.gfirst, at, valid, first);
  }
  store_sums<5>(q.sums, p, {{sums[0].w0, sums[1].w0}, {sums[0].a0, sums[1].a0}, {sums[0].v0, sums[1].v0},
                            {sums[0].k_k, sums[1].k_k}, {sums[0].k_a, sums[1].k_a}});
}

struct HeadGateParameters { float weight, bias, r_k; };
WKV_FN HeadGateParameters gate_parameters(const HeadGateArgs& q, const HeadPlace& p, int i) {
  if (!p.has_elements) return {};
  const long long at = p.channel + i;
  return {q.weight[at], q.bias[at], q.r_k ? q.r_k[at] : 0};
}
// What both passes compute from two elements and their head.
struct HeadGate {
  Pair y, g, r, k, v, normal;
  float scale, bonus;  // 1/σ; Σ r·k·r_k
};
template <class E>
WKV_FN HeadGate head_gate_inputs(const HeadGateArgs& q, long long at, bool valid, const HeadGateParameters (&parameters)[2]) {
  HeadGate x = {load_pair<E>(q.y, at, valid), load_pair<E>(q.g, at, valid), load_pair<E>(q.r, at, valid),
                load_pair<E>(q.k, at, valid), load_pair<E>(q.v, at, valid), {}, 0, 0};
  const float mean = head_sum(x.y.x[0] + x.y.x[1]) / q.shape.N;
  float squares = 0, bonus = 0;
  EACH_OF_2 {
    const float centred = valid ? x.y.x[i] - mean : 0;
    x.normal.x[i] = centred;
    squares += centred * centred;
    bonus += x.r.x[i] * x.k.x[i] * parameters[i].r_k;
  }
  x.scale = 1.0f / square_root(head_sum(squares) / q.shape.N + q.eps);
  x.bonus = q.r ? head_sum(bonus) : 0;
  EACH_OF_2 x.normal.x[i] *= x.scale;
  return x;
}

template <class E> WKV_FN void head_gate(const HeadGateArgs& q) {
  const HeadPlace p = head_place(q.shape);
  HeadGateParameters parameters[2];
  EACH_OF_2 parameters[i] = gate_parameters(q, p, i);
  for (long long n = 0; n < q.shape.slice; n++) {
    const bool valid = p.has_elements && p.begin + n < q.shape.tokens;
    const long long at = (p.begin + n) * p.channels + p.channel;
    const HeadGate x = head_gate_inputs<E>(q, at, valid, parameters);
    Pair out;
    EACH_OF_2 {
      const float inner = x.normal.x[i] * parameters[i].weight + parameters[i].bias + x.bonus * x.v.x[i];
      out.x[i] = inner * time_mix_gate(x.g.x[i], !q.r).factor;
    }
    store_pair<E>(q.out, at, valid, out);
  }
}

template <class E> WKV_FN void head_gate_gradient(const HeadGateArgs& q) {
  const HeadPlace p = head_place(q.shape);
  HeadGateParameters parameters[2], sums[2] = {};
  EACH_OF_2 parameters[i] = gate_parameters(q, p, i);
  for (long long n = 0; n < q.shape.slice; n++) {
    const bool valid = p.has_elements && p.begin + n < q.shape.tokens;
    const long long at = (p.begin + n) * p.channels + p.channel;
    const HeadGate x = head_gate_inputs<E>(q, at, valid, parameters);
    const Pair gout = load_pair<E>(q.gout, at, valid);
    Pair gy, gg, gr, gk, gv, inner;  // inner: the gradient of what g multiplies
    float sum = 0, product = 0, of_bonus = 0;
    EACH_OF_2 {
      const TimeMixGate gate = time_mix_gate(x.g.x[i], !q.r);
      const float value = x.normal.x[i] * parameters[i].weight + parameters[i].bias + x.bonus * x.v.x[i];
      gg.x[i] = gout.x[i] * value * gate.slope;
      inner.x[i] = gout.x[i] * gate.factor;
      const float of_normal = inner.x[i] * parameters[i].weight;
      sum += of_normal;
      product += of_normal * x.normal.x[i];
      of_bonus += inner.x[i] * x.v.x[i];
    }
    sum = head_sum(sum) / q.shape.N;
    product = head_sum(product) / q.shape.N;
    of_bonus = q.r ? head_sum(of_bonus) : 0;
    EACH_OF_2 {
      gy.x[i] = fused_norm_gradient(inner.x[i], parameters[i].weight, x.normal.x[i], x.scale, sum, product);
      gr.x[i] = of_bonus * x.k.x[i] * parameters[i].r_k;
      gk.x[i] = of_bonus * x.r.x[i] * parameters[i].r_k;
      gv.x[i] = inner.x[i] * x.bonus;
      if (valid) {
        sums[i].weight += inner.x[i] * x.normal.x[i];
        sums[i].bias += inner.x[i];
        sums[i].r_k += of_bonus * x.r.x[i] * x.k.x[i];
      }
    }
    store_pair<E>(q.gy, at, valid, gy);
    store_pair<E>(q.gg, at, valid, gg);
    store_pair<E>(q.gr, at, valid, gr);
    store_pair<E>(q.gk, at, valid, gk);
    store_pair<E>(q.gv, at, valid, gv);
  }
  store_sums<3>(q.sums, p, {{sums[0].weight, sums[1].weight}, {sums[0].bias, sums[1].bias}, {sums[0].r_k, sums[1].r_k}});
}

#define KERNELS_OF(E)                                                                                       \
  KERNEL(TIME_MIX_THREADS) fused_keys_##E(const KeysArgs q) { keys<E>(q); }                                 \
  KERNEL(TIME_MIX_THREADS) fused_keys_gradient_##E(const KeysArgs q) { keys_gradient<E>(q); }               \
  KERNEL(TIME_MIX_THREADS) fused_head_gate_##E(const HeadGateArgs q) { head_gate<E>(q); }                   \
  KERNEL(TIME_MIX_THREADS) fused_head_gate_gradient_##E(const HeadGateArgs q) { head_gate_gradient<E>(q); }
KERNELS_OF(fp32)
KERNELS_OF(bf16)
KERNELS_OF(fp16)
#undef KERNELS_OF
#undef EACH_OF_2

}  // namespace fused
