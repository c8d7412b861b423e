// torch.ops.rwkv.wkv6_*: checks arguments, allocates outputs, and runs the CPU loops or launches the
// CUDA kernels.
#include <string>

#include "common/cpu_width.h"
#include "common/heads.h"
#include "common/launcher.h"
#include "wkv6/wkv6_args.h"
#include "wkv6/wkv6_cpu.h"

namespace {

using arguments::check;
using arguments::flags;
using arguments::floats;
using heads::aligned;
using heads::sum_blocks;

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

// ---- CUDA: kernels launched on torch's stream. Only pointers are used, so tests can run this on a CPU ----

namespace {

// The kernels' name for heads of N elements. Heads of more than 64 are computed in fp32, with the
// keys of a head in several blocks.
std::string cuda_kind(const Tensor& r) {
  if (r.size(3) > 64) {
    TORCH_CHECK(r.scalar_type() == at::kFloat, "wkv6's CUDA kernels take fp32 for heads of more than 64 elements; r is ",
                r.scalar_type());
    return "wide";
  }
  switch (r.scalar_type()) {
    case at::kFloat: return "fp32";
    case at::kBFloat16: return "bf16";
    case at::kHalf: return "fp16";
    default: TORCH_CHECK(false, "wkv6's CUDA kernels take fp32, bf16 or fp16; r is ", r.scalar_type());
  }
}

// Blocks per head and segment.
int64_t key_blocks(int64_t N) { return N <= 64 ? 1 : N / 16; }

// Segments of `segment` tokens; 0: one.
int64_t segments(const Tensor& r, int64_t segment) {
  TORCH_CHECK(segment >= 0 && segment % WKV6_SAVE_INTERVAL == 0, "wkv6: the tokens per segment must be a multiple of ",
              WKV6_SAVE_INTERVAL, ", or 0 for all; got ", segment);
  return segment ? (r.size(1) + segment - 1) / segment : 1;
}

// Aligned copies of what both passes read, where it is not aligned, and pointers to it.
struct CudaInputs {
  Tensor r, w, k, v, u;
  Optional<Tensor> initial;
  Wkv6Args args{};

  CudaInputs(const Tensor& r_, const Tensor& w_, const Tensor& k_, const Tensor& v_, const Tensor& u_,
             const Optional<Tensor>& initial_, const Optional<Tensor>& reset, const Tensor& saved, int64_t segment)
      : r(aligned(r_)), w(aligned(w_)), k(aligned(k_)), v(aligned(v_)), u(u_), initial(aligned(initial_)) {
    args.B = r.size(0), args.T = r.size(1), args.H = r.size(2), args.N = r.size(3);
    args.key_blocks = key_blocks(args.N);
    args.segment = segment ? segment : args.T, args.segments = segments(r, segment);
    args.r = r.data_ptr(), args.k = k.data_ptr(), args.v = v.data_ptr(), args.w = floats(&w), args.u = floats(&u);
    args.constant = w.dim() == 2;
    args.reset = flags(or_null(reset)), args.initial = floats(or_null(initial)), args.saved = saved.data_ptr<float>();
  }
};

void launch(int64_t device, int64_t stream, const std::string& kernel, const Wkv6Args& args) {
  launcher::launch(device, reinterpret_cast<void*>(stream), kernel, args.B * args.H * args.segments * args.key_blocks,
                   32 * WKV6_WARPS, &args);
}

// Replaces args.first, the states before the first segments, by the states before all segments, and returns the latter.
Tensor states_before_segments(Wkv6Args& args, const Tensor& w, const std::string& kind, int64_t device, int64_t stream) {
  if (args.segments == 1) return {};
  constexpr int THREADS = 32 * WKV6_WARPS;
  const int64_t heads = args.B * args.H, size = args.N * args.N;
  const Tensor states = w.new_empty({heads, args.segments, size}), decays = w.new_empty({heads, args.segments, args.N});
  args.states = states.data_ptr<float>(), args.decays = decays.data_ptr<float>();
  launch(device, stream, "wkv6_summary_" + kind, args);
  launcher::launch(device, reinterpret_cast<void*>(stream), "wkv6_scan", (heads * size / 4 + THREADS - 1) / THREADS,
                   THREADS, &args);
  args.first = args.states;
  return states;
}

}  // namespace

Outputs gpu::wkv6_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                          const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset, int64_t segment, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, u, or_null(state), or_null(initial), or_null(reset));
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  const std::string kind = cuda_kind(r);
  const Tensor y = r.new_empty({key_blocks(N), B, T, H, N}), last = w.new_empty({B, H, N, N});
  const Tensor saved = w.new_empty({B, H, chunks(r), N, N});
  if (r.numel() > 0) {
    CudaInputs inputs(r, w, k, v, u, initial, reset, saved, segment);
    const Optional<Tensor> aligned_state = aligned(state);
    inputs.args.first = floats(or_null(aligned_state));
    const Tensor states = states_before_segments(inputs.args, w, kind, device, stream);
    inputs.args.y = y.data_ptr(), inputs.args.last = last.data_ptr<float>();
    launch(device, stream, "wkv6_output_" + kind, inputs.args);
  }
  return {sum_blocks(y), last, saved};
}

Wkv6GradientTensors gpu::wkv6_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& u, const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                       const Tensor& saved, const Tensor& gy, const Optional<Tensor>& gstate,
                                       int64_t segment, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, u, nullptr, or_null(initial), or_null(reset));
  heads::check_gradients("wkv6", r, chunks(r), saved, gy, or_null(gstate));
  const std::string kind = cuda_kind(r);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3), blocks = key_blocks(N);
  const int64_t parts = segments(r, segment);
  const bool constant = w.dim() == 2;
  const Tensor gr = r.new_empty(r.sizes()), gk = k.new_empty(k.sizes()), gv = v.new_empty({blocks, B, T, H, N});
  const Tensor gw = constant ? w.new_empty({parts, B, H, N}) : w.new_empty(w.sizes());
  const Tensor gu = u.new_empty({parts, B, H, N}), gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_empty({parts, B, H, N, N}) : Tensor();
  if (r.numel() > 0) {
    const Tensor work = w.new_empty({B * H * parts * blocks, WKV6_WORK});
    CudaInputs inputs(r, w, k, v, u, initial, reset, saved, segment);
    const Tensor aligned_gy = aligned(gy);
    const Optional<Tensor> aligned_gstate = aligned(gstate);
    Wkv6Args& args = inputs.args;
    args.gy = aligned_gy.data_ptr(), args.work = work.data_ptr<float>();
    Wkv6Args reversed = args;
    reversed.reverse = true, reversed.k = args.r, reversed.v = args.gy, reversed.first = floats(or_null(aligned_gstate));
    const Tensor gstates = states_before_segments(reversed, w, kind, device, stream);
    args.glast = reversed.first;
    args.gr = gr.data_ptr(), args.gk = gk.data_ptr(), args.gv = gv.data_ptr();
    args.gw = gw.data_ptr<float>(), args.gu = gu.data_ptr<float>(), args.gfirst = gfirst.data_ptr<float>();
    args.ginitial = or_null(initial) ? ginitial.data_ptr<float>() : nullptr;
    launch(device, stream, "wkv6_gradient_" + kind, args);
  }
  return {gr, constant ? sum_blocks(gw) : gw, gk, sum_blocks(gv), sum_blocks(gu), gfirst,
          or_null(initial) ? sum_blocks(ginitial) : ginitial};
}
