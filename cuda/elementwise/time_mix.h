// The elementwise formulas of the time-mix of RWKV-5 to 7 around WKV, with their gradients, for one
// element; sums over the elements of its head are arguments.
//
// keys  of RWKV-7, from the outputs k', v', w', a', m of linear layers and the value f of block 0:
//       w = −e^(−½) σ(w0 + w')      i = σ(a0 + a')      v = v' + (f − v') σ(v0 + m), in block 0 v'
//       κ = k'·k_k / max(‖k'·k_k‖, 1e-12)      a = −κ      b = κ·i      k = k'·(1 + (i − 1)·k_a)
// gate  norm(y)·silu(g), the norm over the elements of a head; RWKV-7: (norm(y) + s·v)·g with
//       s = Σ r·k·r_k over the head
//
// The including file defines what fused.h needs, and includes it.

struct TimeMixKeysParameters { wkv_float w0, a0, v0, k_k, k_a; };
struct TimeMixKeysInputs { wkv_float k, v, w, a, mix, first; };
struct TimeMixKeys { wkv_float w, k, v, removal, rate; };  // a = −removal, b = removal·rate

// inverse: 1 / max(‖k'·k_k‖, 1e-12). later: not in block 0.
WKV_FN TimeMixKeys time_mix_keys(const TimeMixKeysInputs& x, const TimeMixKeysParameters& p, wkv_float inverse, bool later) {
  TimeMixKeys y;
  y.w = -0.60653065971263342f * fused_sigmoid(p.w0 + x.w).on;
  y.rate = fused_sigmoid(p.a0 + x.a).on;
  y.v = later ? x.v + (x.first - x.v) * fused_sigmoid(p.v0 + x.mix).on : x.v;
  y.removal = x.k * p.k_k * inverse;
  y.k = x.k * (1.0f + (y.rate - 1.0f) * p.k_a);
  return y;
}

// Gradients of w, k, v, and of a and b.
struct TimeMixKeysGradients { wkv_float w, k, v, a, b; };
// The gradient of the removal key κ.
WKV_FN wkv_float time_mix_removal_gradient(const TimeMixKeysGradients& g, const TimeMixKeys& y) { return g.b * y.rate - g.a; }
// Writes the gradients of the inputs and of the parameters. product: the dot product of κ and its
// gradient over the head; 0 where the norm is below 1e-12.
WKV_FN void time_mix_keys_gradient(const TimeMixKeysGradients& g, const TimeMixKeysInputs& x, const TimeMixKeysParameters& p,
                                   const TimeMixKeys& y, wkv_float inverse, wkv_float product, bool later,
                                   TimeMixKeysInputs& gx, TimeMixKeysParameters& gp) {
  const FusedSigmoid decay = fused_sigmoid(p.w0 + x.w), rate = fused_sigmoid(p.a0 + x.a);
  const wkv_float of_scaled = (time_mix_removal_gradient(g, y) - y.removal * product) * inverse;  // of k'·k_k
  const wkv_float of_rate = g.b * y.removal + g.k * x.k * p.k_a;
  gx.w = gp.w0 = g.w * y.w * decay.off;
  gx.a = gp.a0 = of_rate * rate.on * rate.off;
  gx.k = g.k * (1.0f + (rate.on - 1.0f) * p.k_a) + of_scaled * p.k_k;
  gp.k_k = of_scaled * x.k;
  gp.k_a = -g.k * x.k * rate.off;
  if (later) {
    const FusedSigmoid share = fused_sigmoid(p.v0 + x.mix);
    gx.v = g.v * share.off;
    gx.first = g.v * share.on;
    gx.mix = gp.v0 = gx.first * (x.first - x.v) * share.off;
  } else {
    gx.v = g.v;
    gx.first = gx.mix = gp.v0 = wkv_float{};
  }
}

struct TimeMixGate { wkv_float factor, slope; };  // silu(g) and its derivative; RWKV-7: g and 1
WKV_FN TimeMixGate time_mix_gate(wkv_float g, bool silu) {
  if (!silu) return {g, wkv_float{} + 1.0f};
  const FusedSigmoid s = fused_sigmoid(g);
  return {g * s.on, s.on * (1.0f + g * s.off)};
}
