// torch.ops.rwkv.wkv7_cuda_*: checks arguments, allocates outputs and launches the CUDA kernels on
// torch's stream. Only pointers are used, so tests can run this on a CPU.
#include <string>

#include "common/launcher.h"
#include "wkv7/wkv7_args.h"
#include "wkv7/wkv7_checks.h"

using namespace wkv7_checks;

namespace {

// Heads of more than 64 elements are computed in fp32, by kernels for a head of `width`.
struct Plan {
  int width;
  std::string kind;
  int64_t forward_warps, backward_warps;  // per block
};

Plan plan_of(const Tensor& r, bool narrow) {
  if (r.size(3) > 64) {
    TORCH_CHECK(r.scalar_type() == at::kFloat, "wkv7's CUDA kernels take fp32 for heads of more than 64 elements; r is ",
                r.scalar_type());
    const int width = r.size(3) > 128 ? 256 : 128;
    return {width, std::to_string(width), WKV7_WARPS, WKV7_WIDE_WARPS};
  }
  const int64_t warps = narrow ? WKV7_NARROW_WARPS : WKV7_WARPS;
  switch (r.scalar_type()) {
    case at::kFloat: return {64, "fp32", warps, WKV7_WARPS};
    case at::kBFloat16: return {64, "bf16", warps, WKV7_WARPS};
    case at::kHalf: return {64, "fp16", warps, WKV7_WARPS};
    default: TORCH_CHECK(false, "wkv7's CUDA kernels take fp32, bf16 or fp16; r is ", r.scalar_type());
  }
}

int64_t row_blocks(int64_t N, int64_t warps) { return (N + warps * WKV7_WARP_ROWS - 1) / (warps * WKV7_WARP_ROWS); }

void check_matrices(const Tensor& r, const std::string& method) {
  TORCH_CHECK(r.size(3) == 64, "wkv7: method ", method, " is for heads of 64 elements; got ", r.size(3));
}

// The kernels read four elements at once. A tensor may start in the middle of such a vector.
Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % (4 * x.element_size()) ? x.clone() : x;
}
Optional<Tensor> aligned(const Optional<Tensor>& x) { return or_null(x) ? Optional<Tensor>(aligned(*x)) : x; }

// Inputs of both directions, kept until the kernels are launched.
struct Inputs {
  Tensor r, w, k, v, a, b;
  Optional<Tensor> initial;

  Inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
         const Optional<Tensor>& initial)
      : r(aligned(r)), w(aligned(w)), k(aligned(k)), v(aligned(v)), a(aligned(a)), b(aligned(b)),
        initial(aligned(initial)) {}

  Wkv7Args args(const Optional<Tensor>& reset, const Tensor& saved) const {
    Wkv7Args args{};
    args.B = r.size(0), args.T = r.size(1), args.H = r.size(2), args.N = r.size(3);
    args.r = r.data_ptr(), args.w = floats(&w), args.k = k.data_ptr(), args.v = v.data_ptr(), args.a = a.data_ptr(),
    args.b = b.data_ptr();
    args.reset = flags(or_null(reset)), args.initial = floats(or_null(initial)), args.saved = saved.data_ptr<float>();
    return args;
  }
};

struct Launch {
  int64_t device, stream;
  void operator()(const std::string& kernel, int64_t blocks, int64_t warps, const Wkv7Args& args,
                  unsigned shared = 0) const {
    launcher::launch(device, reinterpret_cast<void*>(stream), kernel, blocks, int(32 * warps), &args, shared);
  }
};

Tensor sum_rows(const Tensor& x) { return x.size(0) == 1 ? x.select(0, 0) : x.sum(0); }

}  // namespace

Outputs gpu::wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                          const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset, const std::string& method, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset));
  const bool narrow = method == "narrow", parallel = method == "parallel";
  TORCH_CHECK(narrow || parallel || method == "wide", "wkv7: no method ", method);
  if (parallel) check_matrices(r, method);
  const Plan plan = plan_of(r, narrow);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3), heads = B * H;
  const auto fp32 = r.options().dtype(at::kFloat);
  const Tensor y = r.new_empty(r.sizes()), last = r.new_empty({B, H, N, N}, fp32);
  const Tensor saved = r.new_empty({B, H, chunks(T), N, N}, fp32);
  if (r.numel() == 0) return {y, last, saved};
  const Inputs inputs(r, w, k, v, a, b, initial);
  const Optional<Tensor> first = aligned(state);
  Wkv7Args args = inputs.args(reset, saved);
  args.first = floats(or_null(first)), args.y = y.data_ptr(), args.last = last.data_ptr<float>();
  const Launch launch{device, stream};
  if (parallel) {
    const Tensor maps = r.new_empty({heads * chunks(T), WKV7_MAP_FLOATS}, fp32);
    args.work = maps.data_ptr<float>();
    launch("wkv7_prepare_output_" + plan.kind, heads * chunks(T), WKV7_CHUNK_WARPS, args, WKV7_PREPARE_MEMORY);
    launch("wkv7_scan_output", heads, WKV7_CHUNK_WARPS, args);
    launch("wkv7_parallel_output_" + plan.kind, heads * chunks(T), WKV7_CHUNK_WARPS, args, WKV7_OUTPUT_MEMORY);
  } else {
    args.row_blocks = row_blocks(N, plan.forward_warps);
    const std::string kernel = narrow && plan.width == 64 ? "wkv7_narrow_output_" : "wkv7_output_";
    launch(kernel + plan.kind, heads * args.row_blocks, plan.forward_warps, args);
  }
  return {y, last, saved};
}

Wkv7GradientTensors gpu::wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                       const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                       const Optional<Tensor>& gstate, const std::string& method, int64_t device,
                                       int64_t stream) {
  check_inputs(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset));
  check_gradient_inputs(r, saved, gy, or_null(gstate));
  const bool tokens = method == "tokens", parallel = method == "parallel";
  TORCH_CHECK(tokens || parallel || method == "chunks", "wkv7: no method ", method);
  if (!tokens) check_matrices(r, method);
  const Plan plan = plan_of(r, false);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3), heads = B * H;
  const auto fp32 = r.options().dtype(at::kFloat);
  const int64_t parts = tokens ? row_blocks(N, plan.backward_warps) : 1;
  const auto sum_over_rows = [&](const Tensor& of) { return of.new_empty({parts, B, T, H, N}); };
  const Tensor gr = sum_over_rows(r), gw = sum_over_rows(w), gk = sum_over_rows(k), ga = sum_over_rows(a),
               gb = sum_over_rows(b), gv = v.new_empty(v.sizes());
  const Tensor gfirst = w.new_empty({B, H, N, N});
  Tensor ginitial;
  if (or_null(initial)) ginitial = w.new_empty({B, H, parallel ? chunks(T) : 1, N, N});
  if (r.numel() > 0) {
    const Inputs inputs(r, w, k, v, a, b, initial);
    const Tensor gy4 = aligned(gy);
    const Optional<Tensor> glast = aligned(gstate);
    Wkv7Args args = inputs.args(reset, saved);
    args.gy = gy4.data_ptr(), args.glast = floats(or_null(glast));
    args.gr = gr.data_ptr(), args.gw = gw.data_ptr<float>(), args.gk = gk.data_ptr(), args.gv = gv.data_ptr(),
    args.ga = ga.data_ptr(), args.gb = gb.data_ptr(), args.gfirst = gfirst.data_ptr<float>();
    args.ginitial = or_null(initial) ? ginitial.data_ptr<float>() : nullptr;
    const Launch launch{device, stream};
    if (tokens) {
      const Tensor work =
          r.new_empty({heads * parts, wkv7_work_floats(plan.width, int(plan.backward_warps))}, fp32);
      args.work = work.data_ptr<float>(), args.row_blocks = parts;
      launch("wkv7_gradient_" + plan.kind, heads * parts, plan.backward_warps, args);
    } else if (parallel) {
      const Tensor maps = r.new_empty({heads * chunks(T), WKV7_MAP_FLOATS}, fp32), gstates = saved.new_empty(saved.sizes());
      args.work = maps.data_ptr<float>(), args.gstates = gstates.data_ptr<float>();
      launch("wkv7_prepare_gradient_" + plan.kind, heads * chunks(T), WKV7_CHUNK_WARPS, args, WKV7_PREPARE_MEMORY);
      launch("wkv7_scan_gradient", heads, WKV7_CHUNK_WARPS, args);
      launch("wkv7_parallel_gradient_" + plan.kind, heads * chunks(T), WKV7_CHUNK_WARPS, args, WKV7_GRADIENT_MEMORY);
    } else launch("wkv7_chunk_gradient_" + plan.kind, heads, WKV7_CHUNK_WARPS, args, WKV7_GRADIENT_MEMORY);
  }
  if (or_null(initial)) ginitial = ginitial.size(2) == 1 ? ginitial.select(2, 0) : ginitial.sum(2);
  return {sum_rows(gr), sum_rows(gw), sum_rows(gk), gv, sum_rows(ga), sum_rows(gb), gfirst, ginitial};
}
