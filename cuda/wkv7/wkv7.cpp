// torch.ops.rwkv.wkv7_cpu_*: checks arguments, allocates outputs, and runs the CPU loops.
#include <ATen/Parallel.h>

#include <vector>

#include "common/cpu_width.h"
#include "wkv7/wkv7_checks.h"

using namespace wkv7_checks;

namespace {

Wkv7Problem problem(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                    const Tensor& b, const Tensor* state, const Tensor* initial, const Tensor* reset,
                    const Tensor& saved) {
  return {r.size(1), r.size(2), r.size(3), r.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(),
          floats(&w), flags(reset), floats(state), floats(initial), saved.data_ptr<float>()};
}

const Wkv7Loops& loops() {
#ifdef __x86_64__
  if (cpu_width() == Width::avx512_bf16) return wkv7_loops_avx512_bf16;
  if (cpu_width() == Width::avx512) return wkv7_loops_avx512;
  if (cpu_width() == Width::avx2) return wkv7_loops_avx2;
#endif
  return wkv7_loops_baseline;
}

int cpu_dtype(const Tensor& r) {
  TORCH_CHECK(r.is_cpu() && (r.scalar_type() == at::kFloat || r.scalar_type() == at::kBFloat16),
              "wkv7's CPU kernels take fp32 or bf16 on a CPU; r is ", r.scalar_type(), " on ", r.device());
  return r.scalar_type() == at::kBFloat16;
}

// Calls work(row, head, scratch) for each head of each batch row, in parallel.
template <class F>
void each_head(const Tensor& r, int64_t scratch, const F& work) {
  const int64_t H = r.size(2);
  at::parallel_for(0, r.size(0) * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(scratch);
    for (int64_t i = begin; i < end; i++) work(i / H, i % H, memory.data());
  });
}

}  // namespace

Outputs cpu::wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                          const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset) {
  check_inputs(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset));
  const int dtype = cpu_dtype(r);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const Tensor y = r.new_empty(r.sizes()), last = r.new_empty({B, H, N, N}, fp32);
  const Tensor saved = r.new_empty({B, H, chunks(T), N, N}, fp32);
  const Wkv7Problem q = problem(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset), saved);
  const Wkv7Outputs out{y.data_ptr(), last.data_ptr<float>()};
  each_head(r, wkv7_forward_scratch(N),
            [&](int64_t row, int64_t head, float* scratch) { loops().forward[dtype](q, out, row, head, scratch); });
  return {y, last, saved};
}

Wkv7GradientTensors cpu::wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                       const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                       const Optional<Tensor>& gstate) {
  check_inputs(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset));
  const int dtype = cpu_dtype(r);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  check_gradient_inputs(r, saved, gy, or_null(gstate));
  const Tensor gr = r.new_empty(r.sizes()), gw = w.new_empty(w.sizes()), gk = k.new_empty(k.sizes()),
               gv = v.new_empty(v.sizes()), ga = a.new_empty(a.sizes()), gb = b.new_empty(b.sizes());
  const Tensor gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_empty({B, H, N, N}) : Tensor();
  const Wkv7Problem q = problem(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset), saved);
  const Wkv7Gradients grad{gy.data_ptr(), floats(or_null(gstate)), gr.data_ptr(), gk.data_ptr(), gv.data_ptr(),
                           ga.data_ptr(), gb.data_ptr(), gw.data_ptr<float>(), gfirst.data_ptr<float>(),
                           or_null(initial) ? ginitial.data_ptr<float>() : nullptr};
  each_head(r, wkv7_backward_scratch(N),
            [&](int64_t row, int64_t head, float* scratch) { loops().backward[dtype](q, grad, row, head, scratch); });
  return {gr, gw, gk, gv, ga, gb, gfirst, ginitial};
}
