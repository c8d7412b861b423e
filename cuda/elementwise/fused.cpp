// torch.ops.rwkv.norm_*, mix_*, gate_*, relu2_*, dropout*, loss and adam on a CPU: checks
// arguments, allocates outputs, and splits the work over threads. Sums over rows use a fixed number
// of slices, so results are bit-identical for any number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "common/cpu_width.h"
#include "elementwise/fused_cpu.h"
#include "common/operations.h"

namespace cpu {
namespace {

constexpr int64_t SLICES = 16;      // row slices, for sums over rows
constexpr int64_t GRAIN = 1 << 14;  // elements per task; a multiple of every block size

const FusedLoops& loops() {
#ifdef __x86_64__
  if (cpu_width() == Width::avx512_bf16) return fused_loops_avx512_bf16;
  if (cpu_width() == Width::avx512) return fused_loops_avx512;
  if (cpu_width() == Width::avx2) return fused_loops_avx2;
#endif
  return fused_loops_baseline;
}

void* data(const Tensor* x) { return x ? x->data_ptr() : nullptr; }

int dtype(const Tensor& x) {
  TORCH_CHECK(x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "the CPU kernels take fp32 or bf16 on a CPU; got ", x.scalar_type(), " on ", x.device());
  return x.scalar_type() == at::kBFloat16;
}
int dtype_pair(const Tensor& x, const Tensor& y) {
  const int a = dtype(x), b = dtype(y);
  TORCH_CHECK(a <= b, "LayerNorm of bf16 inputs returns bf16, not fp32");
  return a == b ? a : FUSED_FP32_BF16;
}
void check(const Tensor& x, const char* name, at::ScalarType type, at::IntArrayRef sizes) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type && x.sizes() == sizes, name,
              " must be a contiguous ", type, " tensor of sizes ", sizes, " on the CPU; got ", x.scalar_type(), " ",
              x.sizes(), " on ", x.device());
}
void check_like(const Tensor& x, const char* name, const Tensor& other) {
  check(x, name, other.scalar_type(), other.sizes());
}
void contiguous(const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_contiguous() && x.dim() >= 1, name, " must be contiguous");
}

template <class F> void parallel_ranges(int64_t count, int64_t grain, const F& work) {
  at::parallel_for(0, (count + grain - 1) / grain, 1,
                   [&](int64_t begin, int64_t end) { work(begin * grain, std::min(count, end * grain)); });
}
int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, columns)); }

// Calls work(slice, begin, end) for SLICES slices of the rows.
template <class F> void parallel_slices(int64_t rows, const F& work) {
  const int64_t size = std::max<int64_t>(1, (rows + SLICES - 1) / SLICES);
  at::parallel_for(0, SLICES, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
      if (i * size < rows) work(i, i * size, std::min(rows, (i + 1) * size));
  });
}

}  // namespace

// ---- LayerNorm ----

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps,
                                        at::ScalarType y_dtype) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", at::kFloat, {D});
  check(b, "b", at::kFloat, {D});
  const Tensor y = x.new_empty(x.sizes(), x.options().dtype(y_dtype)),
               stats = x.new_empty({N, 2}, x.options().dtype(at::kFloat));
  FusedNorm q{};
  q.D = D, q.x = x.data_ptr(), q.w = w.data_ptr<float>(), q.b = b.data_ptr<float>(), q.eps = float(eps),
  q.y = y.data_ptr(), q.stats = stats.data_ptr<float>();
  const auto run = loops().norm[dtype_pair(x, y)];
  parallel_ranges(N, row_grain(D), [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                 const Tensor& stats, bool affine) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", at::kFloat, {D});
  check(gy, "gy", gy.scalar_type(), x.sizes());
  check(stats, "stats", at::kFloat, {N, 2});
  const auto fp32 = x.options().dtype(at::kFloat);
  const Tensor gx = x.new_empty(x.sizes()), gw = affine ? x.new_zeros({2, SLICES, D}, fp32) : Tensor();
  FusedNorm q{};
  q.D = D, q.x = x.data_ptr(), q.w = w.data_ptr<float>(), q.stats = stats.data_ptr<float>(), q.gy = gy.data_ptr(),
  q.gx = gx.data_ptr();
  const auto run = loops().norm_gradient[dtype_pair(x, gy)];
  parallel_slices(N, [&](int64_t slice, int64_t begin, int64_t end) {
    FusedNorm part = q;
    if (affine) part.gw = gw.data_ptr<float>() + slice * D, part.gb = part.gw + SLICES * D;
    run(part, begin, end);
  });
  if (!affine) return {gx, Tensor(), Tensor()};
  const Tensor sums = gw.sum(1);
  return {gx, sums[0], sums[1]};
}

// ---- token shift and mixing ----

static FusedMix mix_of(const Tensor& x, const Tensor& last, const Tensor* initial, const Tensor* reset,
                       const Tensor& mix) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [B, T, D]; got ", x.sizes());
  TORCH_CHECK(mix.dim() == 2 && mix.size(0) >= 1 && mix.size(0) <= 3, "mix must be [1 to 3, D]; got ", mix.sizes());
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  check(last, "last", x.scalar_type(), {B, D});
  if (initial) check(*initial, "initial", x.scalar_type(), {B, D});
  check(mix, "mix", at::kFloat, {mix.size(0), D});
  if (reset) check(*reset, "reset", at::kBool, {B, T});
  FusedMix q{};
  q.T = T, q.D = D, q.count = int(mix.size(0)), q.x = x.data_ptr(), q.last = last.data_ptr(),
  q.mix = mix.data_ptr<float>();
  q.initial = initial ? initial->data_ptr() : q.last, q.reset = static_cast<const uint8_t*>(data(reset));
  return q;
}

std::vector<Tensor> mix_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial,
                                const Optional<Tensor>& reset, const Tensor& mix) {
  FusedMix q = mix_of(x, last, or_null(initial), or_null(reset), mix);
  std::vector<Tensor> y;
  for (int i = 0; i < q.count; i++) y.push_back(x.new_empty(x.sizes())), q.y[i] = y.back().data_ptr();
  const auto run = loops().mix[dtype(x)];
  parallel_ranges(x.size(0) * q.T, row_grain(q.D), [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(at::TensorList gy, const Tensor& x, const Tensor& last,
                                                const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                                const Tensor& mix, bool want_mix) {
  FusedMix q = mix_of(x, last, or_null(initial), or_null(reset), mix);
  TORCH_CHECK(int(gy.size()) == q.count, "there must be one gradient per mix");
  for (int i = 0; i < q.count; i++) check_like(gy[i], "gy", x), q.gy[i] = gy[i].data_ptr();
  const Tensor gx = x.new_empty(x.sizes()), glast = last.new_empty(last.sizes());
  const Tensor gmix = want_mix ? x.new_zeros({SLICES, q.count, q.D}, x.options().dtype(at::kFloat)) : Tensor();
  q.gx = gx.data_ptr(), q.glast = glast.data_ptr();
  const auto run = loops().mix_gradient[dtype(x)];
  parallel_slices(x.size(0) * q.T, [&](int64_t slice, int64_t begin, int64_t end) {
    FusedMix part = q;
    if (want_mix) part.gmix = gmix.data_ptr<float>() + slice * q.count * q.D;
    run(part, begin, end);
  });
  return {gx, glast, want_mix ? gmix.sum(0) : Tensor()};
}

// ---- gates, squared ReLU, dropout ----

Tensor gate_forward(const Tensor& r, const Tensor& v) {
  contiguous(r, "r");
  check_like(v, "v", r);
  const Tensor y = r.new_empty(r.sizes());
  FusedGate q{};
  q.r = r.data_ptr(), q.v = v.data_ptr(), q.y = y.data_ptr();
  const auto run = loops().gate[dtype(r)];
  parallel_ranges(r.numel(), GRAIN, [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& g, const Tensor& r, const Tensor& v) {
  contiguous(r, "r");
  check_like(v, "v", r);
  check_like(g, "g", r);
  const Tensor gr = r.new_empty(r.sizes()), gv = v.new_empty(v.sizes());
  FusedGate q{};
  q.r = r.data_ptr(), q.v = v.data_ptr(), q.g = g.data_ptr(), q.gr = gr.data_ptr(), q.gv = gv.data_ptr();
  const auto run = loops().gate_gradient[dtype(r)];
  parallel_ranges(r.numel(), GRAIN, [&](int64_t begin, int64_t end) { run(q, begin, end); });
  return {gr, gv};
}

Tensor relu2_forward(const Tensor& k) {
  contiguous(k, "k");
  const Tensor y = k.new_empty(k.sizes());
  const auto run = loops().relu2[dtype(k)];
  parallel_ranges(k.numel(), GRAIN, [&](int64_t begin, int64_t end) { run(k.data_ptr(), y.data_ptr(), begin, end); });
  return y;
}

Tensor relu2_backward(const Tensor& g, const Tensor& k) {
  contiguous(k, "k");
  check_like(g, "g", k);
  const Tensor gk = k.new_empty(k.sizes());
  const auto run = loops().relu2_gradient[dtype(k)];
  parallel_ranges(k.numel(), GRAIN,
                  [&](int64_t begin, int64_t end) { run(g.data_ptr(), k.data_ptr(), gk.data_ptr(), begin, end); });
  return gk;
}

static void drop(const Tensor& x, const Tensor& y, bool add, const Tensor& seed, double p) {
  contiguous(x, "x");
  TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == at::kLong && seed.device() == x.device(),
              "seed must be one int64 on ", x.device());
  check_like(y, "y", x);
  TORCH_CHECK(p >= 0 && p < 1, "p must be at least 0 and less than 1; got ", p);
  const auto below = uint32_t(p * 4294967296.0);
  const auto value = uint32_t(*seed.data_ptr<int64_t>());
  const auto run = loops().dropout[dtype(x)];
  parallel_ranges(x.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    run(x.data_ptr(), y.data_ptr(), add, value, below, float(1 / (1 - p)), begin, end);
  });
}
Tensor dropout(const Tensor& x, const Tensor& seed, double p) {
  const Tensor y = x.new_empty(x.sizes());
  drop(x, y, false, seed, p);
  return y;
}
void dropout_add(const Tensor& y, const Tensor& x, const Tensor& seed, double p) { drop(x, y, true, seed, p); }

// ---- loss ----

Tensor loss(const Tensor& logits, const Tensor& target, double l2wrap, bool gradient) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && logits.stride(0) >= logits.size(1),
              "logits must be [N, V] with contiguous rows; got ", logits.sizes(), " with strides ", logits.strides());
  const int64_t N = logits.size(0), V = logits.size(1);
  check(target, "target", at::kLong, {N});
  const int64_t* t = target.data_ptr<int64_t>();
  for (int64_t i = 0; i < N; i++)
    TORCH_CHECK_INDEX(t[i] >= 0 && t[i] < V, "target ", t[i], " is outside the vocabulary of ", V);
  const Tensor stats = logits.new_empty({N, 3}, logits.options().dtype(at::kFloat));
  const FusedLoss q{V,
                    logits.stride(0),
                    logits.data_ptr(),
                    reinterpret_cast<const long long*>(t),
                    stats.data_ptr<float>(),
                    float(l2wrap),
                    gradient};
  const auto run = loops().loss[dtype(logits)];
  parallel_ranges(N, 1, [&](int64_t begin, int64_t end) {
    run(q, stats.new_empty({V + loops().block}).data_ptr<float>(), begin, end);
  });
  return stats;
}

// ---- Adam ----

void adam(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, double step, double rate, double beta1,
          double beta2, double eps, double decay, bool decoupled, double clip, const Optional<Tensor>& copy) {
  const std::pair<const Tensor*, const char*> all[] = {
      {&p, "the weight"}, {&g, "the gradient"}, {&m, "exp_avg"}, {&v, "exp_avg_sq"}};
  for (const auto& x : all) check(*x.first, x.second, at::kFloat, p.sizes());
  if (or_null(copy)) check(*or_null(copy), "the copy", at::kBFloat16, p.sizes());
  TORCH_CHECK(step >= 1, "Adam steps count from 1; got ", step);
  const FusedAdam q{p.data_ptr<float>(),
                    m.data_ptr<float>(),
                    v.data_ptr<float>(),
                    g.data_ptr<float>(),
                    static_cast<unsigned short*>(data(or_null(copy))),
                    float(clip),
                    decoupled ? 0.0f : float(decay),
                    decoupled ? float(1 - rate * decay) : 1.0f,
                    float(1 - beta1),
                    float(beta2),
                    float(1 - beta2),
                    float(rate / (1 - std::pow(beta1, step))),
                    float(std::sqrt(1 - std::pow(beta2, step))),
                    float(eps)};
  const auto run = loops().adam;
  parallel_ranges(p.numel(), GRAIN, [&](int64_t begin, int64_t end) { run(q, begin, end); });
}

}  // namespace cpu
