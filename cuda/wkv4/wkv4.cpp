// torch.ops.rwkv.wkv4_*: checks arguments, allocates outputs, and runs the CPU loops or launches
// the CUDA kernels.
#include <ATen/Parallel.h>

#include <algorithm>
#include <string>

#include "common/arguments.h"
#include "common/cpu_width.h"
#include "common/launcher.h"
#include "wkv4/wkv4_args.h"
#include "wkv4/wkv4_cpu.h"

namespace {

using arguments::check;
using arguments::flags;
using arguments::floats;

// Sum over the rows of [rows, C].
Tensor sum_rows(const Tensor& x) { return x.size(0) == 1 ? x.select(0, 0) : x.sum(0); }

void check_inputs(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor* state,
                  const Tensor* initial, const Tensor* reset) {
  TORCH_CHECK(k.dim() == 3 && k.size(1) >= 1, "wkv4: k must be [B, T, C] with T at least 1; got ", k.sizes());
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  check("wkv4", w, "w", k, at::kFloat, {C});
  check("wkv4", u, "u", k, at::kFloat, {C});
  check("wkv4", k, "k", k, k.scalar_type(), {B, T, C});
  check("wkv4", v, "v", k, k.scalar_type(), {B, T, C});
  if (state) check("wkv4", *state, "state", k, at::kFloat, {B, 3, C});
  if (initial) check("wkv4", *initial, "initial", k, at::kFloat, {B, 3, C});
  if (reset) check("wkv4", *reset, "reset", k, at::kBool, {B, T});
}

void check_gradient_inputs(const Tensor& k, const Tensor& saved, int64_t states, const Tensor& gy,
                           const Tensor* gstate) {
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  check("wkv4", saved, "saved", k, at::kFloat, {B, states, 3, C});
  check("wkv4", gy, "gy", k, k.scalar_type(), {B, T, C});
  if (gstate) check("wkv4", *gstate, "gstate", k, at::kFloat, {B, 3, C});
}

// ---- CPU: parallel over (batch row) x (channels) ----

const Wkv4Loops& loops() {
#ifdef __x86_64__
  if (cpu_width() == Width::avx512_bf16) return wkv4_loops_avx512_bf16;
  if (cpu_width() == Width::avx512) return wkv4_loops_avx512;
  if (cpu_width() == Width::avx2) return wkv4_loops_avx2;
#endif
  return wkv4_loops_baseline;
}

// Each thread gets contiguous channels, in full blocks, of as few rows as possible.
template <class F>
void parallel_channels(int64_t block, int64_t B, int64_t C, const F& work) {
  const int64_t blocks = (C + block - 1) / block;
  at::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / blocks, next = std::min(end, (row + 1) * blocks);
      const int64_t c = begin % blocks * block;
      work(row, c, std::min(C, (next - row * blocks) * block) - c);
      begin = next;
    }
  });
}

}  // namespace

Outputs cpu::wkv4_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                          const Optional<Tensor>& state, const Optional<Tensor>& initial,
                          const Optional<Tensor>& reset) {
  check_inputs(w, u, k, v, or_null(state), or_null(initial), or_null(reset));
  const int dtype = arguments::cpu_dtype("wkv4", k, "k");
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  const auto fp32 = k.options().dtype(at::kFloat);
  const int64_t chunks = (T + WKV4_SAVE_INTERVAL - 1) / WKV4_SAVE_INTERVAL;
  const Tensor y = k.new_empty(k.sizes()), saved = k.new_empty({B, chunks + 1, 3, C}, fp32);
  const Wkv4Problem q{T, C, floats(&w), floats(&u), k.data_ptr(), v.data_ptr(), flags(or_null(reset)),
                      floats(or_null(state)), floats(or_null(initial)), saved.data_ptr<float>()};
  const Wkv4Outputs out{y.data_ptr()};
  const Wkv4Loops& chosen = loops();
  parallel_channels(chosen.block, B, C,
                    [&](int64_t row, int64_t c, int64_t n) { chosen.forward[dtype](q, out, row, c, n); });
  return {y, saved.select(1, chunks).clone(), saved};
}

Wkv4GradientTensors cpu::wkv4_backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                       const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                       const Tensor& saved, const Tensor& gy, const Optional<Tensor>& gstate) {
  check_inputs(w, u, k, v, nullptr, or_null(initial), or_null(reset));
  check_gradient_inputs(k, saved, (k.size(1) + WKV4_SAVE_INTERVAL - 1) / WKV4_SAVE_INTERVAL + 1, gy, or_null(gstate));
  const int dtype = arguments::cpu_dtype("wkv4", k, "k");
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  const auto fp32 = k.options().dtype(at::kFloat);
  const Tensor gw = k.new_empty({B, C}, fp32), gu = k.new_empty({B, C}, fp32), gk = k.new_empty(k.sizes()),
               gv = v.new_empty(v.sizes()), gfirst = k.new_empty({B, 3, C}, fp32);
  const Tensor ginitial = or_null(initial) ? k.new_empty({B, 3, C}, fp32) : Tensor();
  const Wkv4Problem q{T, C, floats(&w), floats(&u), k.data_ptr(), v.data_ptr(), flags(or_null(reset)), nullptr,
                      floats(or_null(initial)), saved.data_ptr<float>()};
  const Wkv4Gradients grad{gy.data_ptr(), floats(or_null(gstate)), gw.data_ptr<float>(), gu.data_ptr<float>(),
                           gk.data_ptr(), gv.data_ptr(), gfirst.data_ptr<float>(),
                           or_null(initial) ? ginitial.data_ptr<float>() : nullptr};
  const Wkv4Loops& chosen = loops();
  parallel_channels(chosen.block, B, C,
                    [&](int64_t row, int64_t c, int64_t n) { chosen.backward[dtype](q, grad, row, c, n); });
  return {sum_rows(gw), sum_rows(gu), gk, gv, gfirst, ginitial};
}

// ---- CUDA: kernels launched on torch's stream. Only pointers are used, so tests can run this on a CPU ----

namespace {

std::string cuda_dtype(const Tensor& k) {
  switch (k.scalar_type()) {
    case at::kFloat: return "fp32";
    case at::kBFloat16: return "bf16";
    case at::kHalf: return "fp16";
    default: TORCH_CHECK(false, "wkv4's CUDA kernels take fp32, bf16 or fp16; k is ", k.scalar_type());
  }
}

Wkv4Args cuda_args(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor* initial,
                   const Tensor* reset, const Tensor& saved, int64_t segment) {
  TORCH_CHECK(segment >= WKV4_SAVE_INTERVAL && segment % WKV4_SAVE_INTERVAL == 0,
              "wkv4: segment must be a multiple of ", WKV4_SAVE_INTERVAL, " tokens; got ", segment);
  Wkv4Args args{};
  args.B = k.size(0), args.T = k.size(1), args.C = k.size(2);
  args.segment = segment, args.segments = (args.T + segment - 1) / segment;
  args.w = floats(&w), args.u = floats(&u), args.k = k.data_ptr(), args.v = v.data_ptr(),
  args.initial = floats(initial), args.reset = flags(reset), args.saved = saved.data_ptr<float>();
  return args;
}

void launch(int64_t device, int64_t stream, const std::string& kernel, int64_t threads, const Wkv4Args& args) {
  launcher::launch(device, reinterpret_cast<void*>(stream), kernel, (threads + WKV4_THREADS - 1) / WKV4_THREADS,
                   WKV4_THREADS, &args);
}

}  // namespace

Outputs gpu::wkv4_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                          const Optional<Tensor>& state, const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                          int64_t segment, int64_t device, int64_t stream) {
  check_inputs(w, u, k, v, or_null(state), or_null(initial), or_null(reset));
  const std::string dtype = cuda_dtype(k);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  const auto fp32 = k.options().dtype(at::kFloat);
  const Tensor y = k.new_empty(k.sizes()), last = k.new_empty({B, 3, C}, fp32),
               saved = k.new_empty({B, (T + WKV4_SAVE_INTERVAL - 1) / WKV4_SAVE_INTERVAL, 3, C}, fp32);
  Wkv4Args args = cuda_args(w, u, k, v, or_null(initial), or_null(reset), saved, segment);
  const Tensor has_reset = k.new_empty({B, int64_t(args.segments)}, k.options().dtype(at::kBool));
  args.first = floats(or_null(state)), args.has_reset = has_reset.data_ptr<bool>(), args.y = y.data_ptr(),
  args.last = last.data_ptr<float>();
  if (k.numel() == 0) return {y, last, saved};
  if (args.segments > 1) {
    launch(device, stream, "wkv4_summary_" + dtype, B * args.segments * C, args);
    launch(device, stream, "wkv4_scan", B * C, args);
  }
  launch(device, stream, "wkv4_output_" + dtype, B * args.segments * C, args);
  return {y, last, saved};
}

Wkv4GradientTensors gpu::wkv4_backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                       const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                       const Tensor& saved, const Tensor& gy, const Optional<Tensor>& gstate,
                                       int64_t segment, int64_t device, int64_t stream) {
  check_inputs(w, u, k, v, nullptr, or_null(initial), or_null(reset));
  check_gradient_inputs(k, saved, (k.size(1) + WKV4_SAVE_INTERVAL - 1) / WKV4_SAVE_INTERVAL, gy, or_null(gstate));
  const std::string dtype = cuda_dtype(k);
  const int64_t B = k.size(0), C = k.size(2);
  const auto fp32 = k.options().dtype(at::kFloat);
  Wkv4Args args = cuda_args(w, u, k, v, or_null(initial), or_null(reset), saved, segment);
  const int64_t rows = B * args.segments;
  const Tensor gw = k.new_empty({rows, C}, fp32), gu = k.new_empty({rows, C}, fp32), gk = k.new_empty(k.sizes()),
               gv = v.new_empty(v.sizes());
  const Tensor gfirst = k.new_empty({B, 3, C}, fp32), carry = k.new_empty({rows, 3, C}, fp32);
  const Tensor ginitial = or_null(initial) ? k.new_empty({B, int64_t(args.segments), 3, C}, fp32) : Tensor();
  args.gy = gy.data_ptr(), args.glast = floats(or_null(gstate)), args.carry = carry.data_ptr<float>();
  args.gw = gw.data_ptr<float>(), args.gu = gu.data_ptr<float>(), args.gk = gk.data_ptr(), args.gv = gv.data_ptr(),
  args.gfirst = gfirst.data_ptr<float>();
  args.ginitial = or_null(initial) ? ginitial.data_ptr<float>() : nullptr;
  if (k.numel() > 0) {
    if (args.segments > 1) {
      launch(device, stream, "wkv4_summary_gradient_" + dtype, rows * C, args);
      launch(device, stream, "wkv4_scan_gradient", B * C, args);
    }
    launch(device, stream, "wkv4_gradient_" + dtype, rows * C, args);
  }
  return {sum_rows(gw), sum_rows(gu), gk, gv, gfirst, or_null(initial) ? ginitial.sum(1) : ginitial};
}
