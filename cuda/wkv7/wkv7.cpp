// torch.ops.rwkv.wkv7_*: checks arguments, allocates outputs, and runs the CPU loops or launches the
// CUDA kernels.
#include <ATen/Parallel.h>

#include <string>
#include <vector>

#include "common/cpu_width.h"
#include "common/launcher.h"
#include "common/operations.h"
#include "wkv7/wkv7_args.h"
#include "wkv7/wkv7_cpu.h"

namespace {

void check(const Tensor& x, const char* name, const Tensor& like, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == dtype && x.device() == like.device() && x.is_contiguous(),
              "wkv7: ", name, " must be a contiguous ", dtype, " tensor of sizes ", sizes, " on ", like.device(),
              "; got ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

void check_inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
                  const Tensor* state, const Tensor* initial, const Tensor* reset) {
  TORCH_CHECK(r.dim() == 4 && r.size(1) >= 1, "wkv7: r must be [B, T, H, N] with T at least 1; got ", r.sizes());
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  TORCH_CHECK(N % 16 == 0 && N <= WKV7_MAX_N, "wkv7: the head size must be a multiple of 16, at most ", int(WKV7_MAX_N),
              "; got ", N);
  check(r, "r", r, r.scalar_type(), r.sizes());
  check(w, "w", r, at::kFloat, r.sizes());
  check(k, "k", r, r.scalar_type(), r.sizes());
  check(v, "v", r, r.scalar_type(), r.sizes());
  check(a, "a", r, r.scalar_type(), r.sizes());
  check(b, "b", r, r.scalar_type(), r.sizes());
  if (state) check(*state, "state", r, at::kFloat, {B, H, N, N});
  if (initial) check(*initial, "initial", r, at::kFloat, {B, H, N, N});
  if (reset) check(*reset, "reset", r, at::kBool, {B, T});
}

const float* floats(const Tensor* x) { return x ? x->data_ptr<float>() : nullptr; }
// A bool tensor may hold any nonzero byte for true.
const uint8_t* flags(const Tensor* x) { return x ? static_cast<const uint8_t*>(x->data_ptr()) : nullptr; }

Wkv7Problem problem(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                    const Tensor& b, const Tensor* state, const Tensor* initial, const Tensor* reset,
                    const Tensor& saved) {
  return {r.size(1), r.size(2), r.size(3), r.data_ptr(), k.data_ptr(), v.data_ptr(), a.data_ptr(), b.data_ptr(),
          floats(&w), flags(reset), floats(state), floats(initial), saved.data_ptr<float>()};
}

int64_t chunks(int64_t T) { return (T + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL; }

void check_gradient_inputs(const Tensor& r, const Tensor& saved, const Tensor& gy, const Tensor* gstate) {
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  check(saved, "saved", r, at::kFloat, {B, H, chunks(r.size(1)), N, N});
  check(gy, "gy", r, r.scalar_type(), r.sizes());
  if (gstate) check(*gstate, "gstate", r, at::kFloat, {B, H, N, N});
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

// ---- CUDA: kernels launched on torch's stream. Only pointers are used, so tests can run this on a CPU ----

namespace {

// What is launched for heads of N elements. Heads of more than 64 are computed in fp32, with the
// rows of a head in several blocks.
struct CudaPlan {
  int width;  // N, padded
  std::string kind;
  int64_t rows_forward, rows_backward;  // per block
};
constexpr int64_t rows_of(int warps) { return warps * WKV7_WARP_ROWS; }

CudaPlan cuda_plan(const Tensor& r, bool narrow) {
  const int64_t N = r.size(3);
  if (N > 64) {
    TORCH_CHECK(r.scalar_type() == at::kFloat, "wkv7's CUDA kernels take fp32 for heads of more than 64 elements; r is ",
                r.scalar_type());
    const int width = N > 128 ? 256 : 128;
    return {width, std::to_string(width), rows_of(WKV7_WARPS), rows_of(WKV7_WIDE_WARPS)};
  }
  const int64_t rows = rows_of(narrow ? WKV7_NARROW_WARPS : WKV7_WARPS);
  switch (r.scalar_type()) {
    case at::kFloat: return {64, "fp32", rows, rows_of(WKV7_WARPS)};
    case at::kBFloat16: return {64, "bf16", rows, rows_of(WKV7_WARPS)};
    case at::kHalf: return {64, "fp16", rows, rows_of(WKV7_WARPS)};
    default: TORCH_CHECK(false, "wkv7's CUDA kernels take fp32, bf16 or fp16; r is ", r.scalar_type());
  }
}

// The kernels read four elements at once. A tensor may start in the middle of such a vector.
Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % (4 * x.element_size()) ? x.clone() : x;
}
Optional<Tensor> aligned(const Optional<Tensor>& x) { return or_null(x) ? Optional<Tensor>(aligned(*x)) : x; }

void launch(int64_t device, int64_t stream, const std::string& kernel, int64_t rows, Wkv7Args& args) {
  args.row_blocks = (args.N + rows - 1) / rows;
  launcher::launch(device, reinterpret_cast<void*>(stream), kernel, args.B * args.H * args.row_blocks,
                   int(rows / WKV7_WARP_ROWS * 32), &args);
}

Tensor sum_row_blocks(const Tensor& x) { return x.size(0) == 1 ? x.select(0, 0) : x.sum(0); }

}  // namespace

Outputs gpu::wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                          const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset, bool narrow, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset));
  const CudaPlan plan = cuda_plan(r, narrow);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const Tensor y = r.new_empty(r.sizes()), last = r.new_empty({B, H, N, N}, fp32);
  const Tensor saved = r.new_empty({B, H, chunks(T), N, N}, fp32);
  if (r.numel() == 0) return {y, last, saved};
  const Tensor r4 = aligned(r), w4 = aligned(w), k4 = aligned(k), v4 = aligned(v), a4 = aligned(a), b4 = aligned(b);
  const Optional<Tensor> state4 = aligned(state), initial4 = aligned(initial);
  Wkv7Args args{};
  args.B = B, args.T = T, args.H = H, args.N = N;
  args.r = r4.data_ptr(), args.w = floats(&w4), args.k = k4.data_ptr(), args.v = v4.data_ptr(),
  args.a = a4.data_ptr(), args.b = b4.data_ptr();
  args.reset = flags(or_null(reset)), args.first = floats(or_null(state4)), args.initial = floats(or_null(initial4));
  args.saved = saved.data_ptr<float>(), args.y = y.data_ptr(), args.last = last.data_ptr<float>();
  const bool narrow_kernel = plan.width == 64 && narrow;
  launch(device, stream, (narrow_kernel ? "wkv7_narrow_output_" : "wkv7_output_") + plan.kind, plan.rows_forward, args);
  return {y, last, saved};
}

Wkv7GradientTensors gpu::wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                       const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                       const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                       const Optional<Tensor>& gstate, int64_t device, int64_t stream) {
  check_inputs(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset));
  check_gradient_inputs(r, saved, gy, or_null(gstate));
  const CudaPlan plan = cuda_plan(r, false);
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const int64_t row_blocks = (N + plan.rows_backward - 1) / plan.rows_backward;
  const auto sum_over_rows = [&](const Tensor& of) { return of.new_empty({row_blocks, B, T, H, N}); };
  const Tensor gr = sum_over_rows(r), gw = sum_over_rows(w), gk = sum_over_rows(k), ga = sum_over_rows(a),
               gb = sum_over_rows(b), gv = v.new_empty(v.sizes());
  const Tensor gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_empty({B, H, N, N}) : Tensor();
  if (r.numel() > 0) {
    const Tensor work = r.new_empty(
        {B * H * row_blocks, wkv7_work_floats(plan.width, int(plan.rows_backward / WKV7_WARP_ROWS))}, fp32);
    const Tensor r4 = aligned(r), w4 = aligned(w), k4 = aligned(k), v4 = aligned(v), a4 = aligned(a), b4 = aligned(b),
                 gy4 = aligned(gy);
    const Optional<Tensor> initial4 = aligned(initial), gstate4 = aligned(gstate);
    Wkv7Args args{};
    args.B = B, args.T = T, args.H = H, args.N = N;
    args.r = r4.data_ptr(), args.w = floats(&w4), args.k = k4.data_ptr(), args.v = v4.data_ptr(),
    args.a = a4.data_ptr(), args.b = b4.data_ptr();
    args.reset = flags(or_null(reset)), args.initial = floats(or_null(initial4));
    args.saved = saved.data_ptr<float>(), args.gy = gy4.data_ptr(), args.glast = floats(or_null(gstate4));
    args.work = work.data_ptr<float>(), args.gr = gr.data_ptr(), args.gw = gw.data_ptr<float>(),
    args.gk = gk.data_ptr(), args.gv = gv.data_ptr(), args.ga = ga.data_ptr(), args.gb = gb.data_ptr();
    args.gfirst = gfirst.data_ptr<float>(),
    args.ginitial = or_null(initial) ? ginitial.data_ptr<float>() : nullptr;
    launch(device, stream, "wkv7_gradient_" + plan.kind, plan.rows_backward, args);
  }
  return {sum_row_blocks(gr), sum_row_blocks(gw), sum_row_blocks(gk), gv,
          sum_row_blocks(ga), sum_row_blocks(gb), gfirst, ginitial};
}
