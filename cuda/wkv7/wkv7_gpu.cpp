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
  int64_t blocks;  // per head
};

Plan plan_of(const Tensor& r) {
  const int64_t N = r.size(3);
  const int width = N > 128 ? 256 : N > 64 ? 128 : 64;
  const int64_t blocks = (N + wkv7_rows(width) - 1) / wkv7_rows(width);
  if (width == 64 && r.scalar_type() == at::kBFloat16) return {width, "bf16", blocks};
  if (width == 64 && r.scalar_type() == at::kHalf) return {width, "fp16", blocks};
  TORCH_CHECK(r.scalar_type() == at::kFloat, "wkv7's CUDA kernels take fp32, and for heads of up to 64 elements bf16 "
              "and fp16; r is ", r.scalar_type(), " ", r.sizes());
  return {width, width == 64 ? "fp32" : std::to_string(width), blocks};
}

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
  const bool parallel = method == "parallel";
  TORCH_CHECK(parallel || method == "tokens", "wkv7: no method ", method, " of outputs");
  if (parallel) check_matrices(r, method);
  const Plan plan = plan_of(r);
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
    args.row_blocks = plan.blocks;
    launch("wkv7_output_" + plan.kind, heads * plan.blocks, WKV7_WARPS, args);
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
  TORCH_CHECK(tokens || parallel || method == "chunks", "wkv7: no method ", method, " of gradients");
  if (!tokens) check_matrices(r, method);
  const Plan plan = plan_of(r);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3), heads = B * H;
  const auto fp32 = r.options().dtype(at::kFloat);
  const int64_t parts = tokens ? plan.blocks : 1;
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
      const Tensor work = r.new_empty({heads * parts, wkv7_work_floats(plan.width)}, fp32);
      args.work = work.data_ptr<float>(), args.row_blocks = parts;
      launch("wkv7_gradient_" + plan.kind, heads * parts, WKV7_WARPS, args);
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
