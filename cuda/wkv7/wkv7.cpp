// torch.ops.rwkv.wkv7_*: checks arguments, allocates outputs, and runs the CPU loops or launches the
// CUDA kernels.
#include <string>

#include "common/cpu_width.h"
#include "common/launcher.h"
#include "wkv7/wkv7_args.h"
#include "wkv7/wkv7_common.h"

namespace {

using arguments::flags;
using arguments::floats;
using heads::aligned;
using heads::sum_blocks;
using wkv7::check_inputs;
using wkv7::chunks;

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

}  // namespace

Outputs cpu::wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                          const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset) {
  check_inputs(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset));
  const int dtype = arguments::cpu_dtype("wkv7", r, "r");
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const Tensor y = r.new_empty(r.sizes()), last = r.new_empty({B, H, N, N}, fp32);
  const Tensor saved = r.new_empty({B, H, chunks(r), N, N}, fp32);
  const Wkv7Problem q = problem(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset), saved);
  const Wkv7Outputs out{y.data_ptr(), last.data_ptr<float>()};
  heads::each(r, wkv7_forward_scratch(N),
              [&](int64_t row, int64_t head, float* scratch) { loops().forward[dtype](q, out, row, head, scratch); });
  return {y, last, saved};
}

Wkv7GradientTensors cpu::wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                       const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                       const Optional<Tensor>& gstate) {
  check_inputs(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset));
  const int dtype = arguments::cpu_dtype("wkv7", r, "r");
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  heads::check_gradients("wkv7", r, chunks(r), saved, gy, or_null(gstate));
  const Tensor gr = r.new_empty(r.sizes()), gw = w.new_empty(w.sizes()), gk = k.new_empty(k.sizes()),
               gv = v.new_empty(v.sizes()), ga = a.new_empty(a.sizes()), gb = b.new_empty(b.sizes());
  const Tensor gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_empty({B, H, N, N}) : Tensor();
  const Wkv7Problem q = problem(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset), saved);
  const Wkv7Gradients grad{gy.data_ptr(), floats(or_null(gstate)), gr.data_ptr(), gk.data_ptr(), gv.data_ptr(),
                           ga.data_ptr(), gb.data_ptr(), gw.data_ptr<float>(), gfirst.data_ptr<float>(),
                           or_null(initial) ? ginitial.data_ptr<float>() : nullptr};
  heads::each(r, wkv7_backward_scratch(N),
              [&](int64_t row, int64_t head, float* scratch) { loops().backward[dtype](q, grad, row, head, scratch); });
  return {gr, gw, gk, gv, ga, gb, gfirst, ginitial};
}

// ---- CUDA: kernels launched on torch's stream. Only pointers are used, so tests can run this on a CPU ----

namespace {

// What is launched for heads of N elements. Heads of more than 64 are computed in fp32, with the
// rows of a head in several blocks.
struct CudaPlan {
  int width;  // N, padded
  std::string kind;
  int warps_backward;  // per block; forward: WKV7_WARPS
};

CudaPlan cuda_plan(const Tensor& r) {
  const int64_t N = r.size(3);
  if (N > 64) {
    TORCH_CHECK(r.scalar_type() == at::kFloat, "wkv7's CUDA kernels take fp32 for heads of more than 64 elements; r is ",
                r.scalar_type());
    const int width = N > 128 ? 256 : 128;
    return {width, std::to_string(width), WKV7_WIDE_WARPS};
  }
  switch (r.scalar_type()) {
    case at::kFloat: return {64, "fp32", WKV7_WARPS};
    case at::kBFloat16: return {64, "bf16", WKV7_WARPS};
    case at::kHalf: return {64, "fp16", WKV7_WARPS};
    default: TORCH_CHECK(false, "wkv7's CUDA kernels take fp32, bf16 or fp16; r is ", r.scalar_type());
  }
}

// Blocks per head.
int64_t row_blocks(int64_t N, int warps) { return (N + warps * WKV7_WARP_ROWS - 1) / (warps * WKV7_WARP_ROWS); }

// Aligned copies of what both passes read, where it is not aligned, and pointers to it.
struct CudaInputs {
  Tensor r, w, k, v, a, b;
  Optional<Tensor> initial;
  Wkv7Args args{};

  CudaInputs(const Tensor& r_, const Tensor& w_, const Tensor& k_, const Tensor& v_, const Tensor& a_,
             const Tensor& b_, const Optional<Tensor>& initial_, const Optional<Tensor>& reset, const Tensor& saved)
      : r(aligned(r_)), w(aligned(w_)), k(aligned(k_)), v(aligned(v_)), a(aligned(a_)), b(aligned(b_)),
        initial(aligned(initial_)) {
    args.B = r.size(0), args.T = r.size(1), args.H = r.size(2), args.N = r.size(3);
    args.r = r.data_ptr(), args.w = floats(&w), args.k = k.data_ptr(), args.v = v.data_ptr(), args.a = a.data_ptr(),
    args.b = b.data_ptr();
    args.reset = flags(or_null(reset)), args.initial = floats(or_null(initial)), args.saved = saved.data_ptr<float>();
  }
};

void launch(int64_t device, int64_t stream, const std::string& kernel, int warps, Wkv7Args& args) {
  args.row_blocks = row_blocks(args.N, warps);
  launcher::launch(device, reinterpret_cast<void*>(stream), kernel, args.B * args.H * args.row_blocks, 32 * warps,
                   &args);
}

}  // namespace

Outputs gpu::wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                          const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset));
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const std::string kind = cuda_plan(r).kind;
  const Tensor y = r.new_empty(r.sizes()), last = r.new_empty({B, H, N, N}, fp32);
  const Tensor saved = r.new_empty({B, H, chunks(r), N, N}, fp32);
  if (r.numel() == 0) return {y, last, saved};
  CudaInputs inputs(r, w, k, v, a, b, initial, reset, saved);
  const Optional<Tensor> aligned_state = aligned(state);
  inputs.args.first = floats(or_null(aligned_state));
  inputs.args.y = y.data_ptr(), inputs.args.last = last.data_ptr<float>();
  launch(device, stream, "wkv7_output_" + kind, WKV7_WARPS, inputs.args);
  return {y, last, saved};
}

Wkv7GradientTensors gpu::wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                       const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                       const Optional<Tensor>& gstate, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset));
  heads::check_gradients("wkv7", r, chunks(r), saved, gy, or_null(gstate));
  const CudaPlan plan = cuda_plan(r);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const int64_t blocks = row_blocks(N, plan.warps_backward);
  const auto per_block = [&](const Tensor& x) { return x.new_empty({blocks, B, T, H, N}); };
  const Tensor gr = per_block(r), gw = per_block(w), gk = per_block(k), ga = per_block(a), gb = per_block(b),
               gv = v.new_empty(v.sizes());
  const Tensor gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_empty({B, H, N, N}) : Tensor();
  if (r.numel() > 0) {
    const Tensor work = r.new_empty({B * H * blocks, wkv7_work_floats(plan.width, plan.warps_backward)}, fp32);
    CudaInputs inputs(r, w, k, v, a, b, initial, reset, saved);
    const Tensor aligned_gy = aligned(gy);
    const Optional<Tensor> aligned_gstate = aligned(gstate);
    Wkv7Args& args = inputs.args;
    args.gy = aligned_gy.data_ptr(), args.glast = floats(or_null(aligned_gstate)), args.work = work.data_ptr<float>();
    args.gr = gr.data_ptr(), args.gw = gw.data_ptr<float>(), args.gk = gk.data_ptr(), args.gv = gv.data_ptr(),
    args.ga = ga.data_ptr(), args.gb = gb.data_ptr(), args.gfirst = gfirst.data_ptr<float>();
    args.ginitial = or_null(initial) ? ginitial.data_ptr<float>() : nullptr;
    launch(device, stream, "wkv7_gradient_" + plan.kind, plan.warps_backward, args);
  }
  return {sum_blocks(gr), sum_blocks(gw), sum_blocks(gk), gv, sum_blocks(ga), sum_blocks(gb), gfirst, ginitial};
}
