// torch.ops.rwkv.wkv6_*: checks arguments, allocates outputs, and runs the CPU loops.
#include "wkv6/wkv6_cpu.h"

#include "common/cpu_width.h"
#include "common/heads.h"

namespace {

using arguments::check;
using arguments::flags;
using arguments::floats;

void check_inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                  const Tensor* state, const Tensor* initial, const Tensor* reset) {
  heads::check_common("wkv6", r, WKV6_MAX_N, state, initial, reset);
  const int64_t H = r.size(2), N = r.size(3);
  if (w.dim() == 2) check("wkv6", w, "w", r, at::kFloat, {H, N});
  else check("wkv6", w, "w", r, at::kFloat, r.sizes());
  check("wkv6", k, "k", r, r.scalar_type(), r.sizes());
  check("wkv6", v, "v", r, r.scalar_type(), r.sizes());
  check("wkv6", u, "u", r, at::kFloat, {H, N});
}

Wkv6Problem problem(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                    const Tensor* state, const Tensor* initial, const Tensor* reset, const Tensor& saved) {
  return {r.size(1), r.size(2), r.size(3), r.data_ptr(), k.data_ptr(), v.data_ptr(), floats(&w), w.dim() == 2,
          floats(&u), flags(reset), floats(state), floats(initial), saved.data_ptr<float>()};
}

int64_t chunks(const Tensor& r) { return (r.size(1) + WKV6_SAVE_INTERVAL - 1) / WKV6_SAVE_INTERVAL; }

const Wkv6Loops& loops() {
#ifdef __x86_64__
  if (cpu_width() == Width::avx512_bf16) return wkv6_loops_avx512_bf16;
  if (cpu_width() == Width::avx512) return wkv6_loops_avx512;
  if (cpu_width() == Width::avx2) return wkv6_loops_avx2;
#endif
  return wkv6_loops_baseline;
}

}  // namespace

Outputs cpu::wkv6_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                          const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset) {
  check_inputs(r, w, k, v, u, or_null(state), or_null(initial), or_null(reset));
  const int dtype = arguments::cpu_dtype("wkv6", r, "r");
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  const Tensor y = r.new_empty(r.sizes()), last = w.new_empty({B, H, N, N});
  const Tensor saved = w.new_empty({B, H, chunks(r), N, N});
  const Wkv6Problem q = problem(r, w, k, v, u, or_null(state), or_null(initial), or_null(reset), saved);
  const Wkv6Outputs out{y.data_ptr(), last.data_ptr<float>()};
  heads::each(r, wkv6_forward_scratch(N),
              [&](int64_t row, int64_t head, float* scratch) { loops().forward[dtype](q, out, row, head, scratch); });
  return {y, last, saved};
}

Wkv6GradientTensors cpu::wkv6_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& u, const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                       const Tensor& saved, const Tensor& gy, const Optional<Tensor>& gstate) {
  check_inputs(r, w, k, v, u, nullptr, or_null(initial), or_null(reset));
  const int dtype = arguments::cpu_dtype("wkv6", r, "r");
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  heads::check_gradients("wkv6", r, chunks(r), saved, gy, or_null(gstate));
  const Tensor gr = r.new_empty(r.sizes()), gk = k.new_empty(k.sizes()), gv = v.new_empty(v.sizes());
  const Tensor gw = w.dim() == 2 ? w.new_empty({B, H, N}) : w.new_empty(w.sizes()), gu = u.new_empty({B, H, N});
  const Tensor gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_empty({B, H, N, N}) : Tensor();
  const Wkv6Problem q = problem(r, w, k, v, u, nullptr, or_null(initial), or_null(reset), saved);
  const Wkv6Gradients grad{gy.data_ptr(), floats(or_null(gstate)), gr.data_ptr(), gk.data_ptr(), gv.data_ptr(),
                           gw.data_ptr<float>(), gu.data_ptr<float>(), gfirst.data_ptr<float>(),
                           or_null(initial) ? ginitial.data_ptr<float>() : nullptr};
  heads::each(r, wkv6_backward_scratch(N),
              [&](int64_t row, int64_t head, float* scratch) { loops().backward[dtype](q, grad, row, head, scratch); });
  return {gr, gw, gk, gv, gu, gfirst, ginitial};
}
