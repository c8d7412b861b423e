// The fused operations' kernels as torch sees them: torch.ops.rwkv.cuda_norm_*, cuda_mix_*, ..., as in fused.cpp, and the device and stream to launch
// on. Tensors are only pointers here, which lets tests run the kernels on a CPU. Nothing waits for the device.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "fused_args.h"
#include "launcher.h"
#include "optional.h"

namespace {

using at::Tensor;

constexpr int64_t BUSY = 1 << 16;  // threads that a GPU is given before they share out rows less finely
constexpr int64_t LEAST = 16;      // rows that share a sum, at least: so sums over rows take little room

std::string dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return "fp32";
    case at::kBFloat16: return "bf16";
    case at::kHalf: return "fp16";
    default: TORCH_CHECK(false, "the CUDA unit takes fp32, bf16 or fp16; it got ", x.scalar_type());
  }
}
std::string pair(const Tensor& stream, const Tensor& inside) {
  const std::string a = dtype(stream), b = dtype(inside);
  TORCH_CHECK(a == b || a == "fp32", "a residual stream in ", a, " goes with ", a, " inside the blocks, not with ", b);
  return a == b ? a : a + "_" + b;
}
void check(const Tensor& x, const char* name, const Tensor& like, at::ScalarType type, at::IntArrayRef sizes) {
  TORCH_CHECK(x.is_contiguous() && x.device() == like.device() && x.scalar_type() == type && x.sizes() == sizes, name, " must be a contiguous ", type,
              " tensor of sizes ", sizes, " on ", like.device(), "; it is ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}
void alike(const Tensor& x, const char* name, const Tensor& other) { check(x, name, other, other.scalar_type(), other.sizes()); }
void contiguous(const Tensor& x, const char* name) { TORCH_CHECK(x.is_contiguous() && x.dim() >= 1, name, " must be contiguous"); }
void* data(const Tensor* x) { return x ? x->data_ptr() : nullptr; }
float* floats(const Tensor& x) { return x.data_ptr<float>(); }

// Whether rows of this length, from these pointers on, are read 16 bytes at a time; a null pointer is not read.
bool wide(int64_t length, std::initializer_list<const void*> pointers) {
  return length % FUSED_WIDTH == 0 && std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}
int64_t width(bool wide) { return wide ? FUSED_WIDTH : 1; }
int row_threads(int64_t length, bool wide) { return int(std::min<int64_t>(FUSED_ROW_THREADS, (length / width(wide) + 31) / 32 * 32)); }

struct Launch {
  int64_t device, stream;
  template <class Args> void blocks(const std::string& kernel, int64_t count, int threads, const Args& args) const {
    if (count) launcher::launch(device, reinterpret_cast<void*>(stream), kernel, count, threads, &args);
  }
  template <class Args> void threads(const std::string& kernel, int64_t count, const Args& args) const {
    blocks(kernel, (count + FUSED_THREADS - 1) / FUSED_THREADS, FUSED_THREADS, args);
  }
};

// Rows of `count` that a thread takes, if `at_once` of them could be taken at once: by the shape alone, so that sums have one order.
int64_t slice_of(int64_t count, int64_t at_once) { return std::max(LEAST, count * at_once / BUSY); }

// ---- LayerNorm ----

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps, at::ScalarType inside, int64_t device, int64_t stream) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", x, at::kFloat, {D});
  check(b, "b", x, at::kFloat, {D});
  const Tensor y = at::empty_like(x, x.options().dtype(inside)), stats = at::empty({N, 2}, x.options().dtype(at::kFloat));
  FusedNorm q{};
  q.N = N, q.D = D, q.x = x.data_ptr(), q.w = floats(w), q.b = floats(b), q.eps = float(eps), q.y = y.data_ptr(), q.stats = floats(stats);
  q.wide = wide(D, {q.x, q.w, q.b, q.y});
  Launch{device, stream}.blocks("fused_norm_" + pair(x, y), N, row_threads(D, q.wide), q);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Optional<Tensor>& past, const Tensor& x, const Tensor& w, const Tensor& stats, bool affine,
                                                 int64_t device, int64_t stream) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", x, at::kFloat, {D});
  check(gy, "gy", x, gy.scalar_type(), x.sizes());
  check(stats, "stats", x, at::kFloat, {N, 2});
  if (given(past)) alike(*past, "past", x);
  const Tensor gx = at::empty_like(x);
  FusedNorm q{};
  q.N = N, q.D = D, q.x = x.data_ptr(), q.w = floats(w), q.stats = floats(stats), q.gy = gy.data_ptr(), q.past = data(given(past)), q.gx = gx.data_ptr();
  q.wide = wide(D, {q.x, q.w, q.gy, q.past, q.gx});
  const Launch launch{device, stream};
  launch.blocks("fused_norm_gradient_" + pair(x, gy), N, row_threads(D, q.wide), q);
  if (!affine) return {gx, Tensor(), Tensor()};
  q.slice = slice_of(N, D / width(q.wide));
  const int64_t slices = (N + q.slice - 1) / q.slice;
  const Tensor sums = at::empty({2, slices, D}, x.options().dtype(at::kFloat));
  q.gw = floats(sums), q.gb = q.gw + slices * D;
  launch.threads("fused_norm_sums_" + pair(x, gy), slices * (D / width(q.wide)), q);
  const Tensor total = sums.sum(1);
  return {gx, total[0], total[1]};
}

// ---- token shift and mixing ----

FusedMix mix_of(const Tensor& x, const Tensor& last, const Tensor* reset, const Tensor& mix) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [B, T, D]; it is ", x.sizes());
  TORCH_CHECK(mix.dim() == 2 && mix.size(0) >= 1 && mix.size(0) <= 3, "mix must be [1 to 3, D]; it is ", mix.sizes());
  FusedMix q{};
  q.B = x.size(0), q.T = x.size(1), q.D = x.size(2), q.count = int(mix.size(0));
  check(last, "last", x, x.scalar_type(), {q.B, q.D});
  check(mix, "mix", x, at::kFloat, {q.count, q.D});
  if (reset) check(*reset, "reset", x, at::kBool, {q.B, q.T});
  q.x = x.data_ptr(), q.last = last.data_ptr(), q.mix = floats(mix), q.reset = static_cast<const unsigned char*>(data(reset));
  q.wide = wide(q.D, {q.x, q.last, q.mix});
  return q;
}
int64_t groups(const FusedMix& q) { return q.D / width(q.wide); }
int64_t parts(const FusedMix& q) { return (q.T + q.slice - 1) / q.slice; }

std::vector<Tensor> mix_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& reset, const Tensor& mix, int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, given(reset), mix);
  std::vector<Tensor> y;
  for (int i = 0; i < q.count; i++) y.push_back(at::empty_like(x)), q.y[i] = y.back().data_ptr();
  q.wide = q.wide && wide(q.D, {q.y[0], q.y[1], q.y[2]});
  q.slice = slice_of(q.T, q.B * groups(q));
  Launch{device, stream}.threads("fused_mix_" + dtype(x), q.B * parts(q) * groups(q), q);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(at::TensorList gy, const Tensor& x, const Tensor& last, const Optional<Tensor>& reset, const Tensor& mix, bool want_mix,
                                                int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, given(reset), mix);
  TORCH_CHECK(int(gy.size()) == q.count, "as many gradients as mixes");
  for (int i = 0; i < q.count; i++) alike(gy[i], "gy", x), q.gy[i] = gy[i].data_ptr();
  const Tensor gx = at::empty_like(x), glast = at::empty_like(last);
  q.gx = gx.data_ptr(), q.glast = glast.data_ptr();
  q.wide = q.wide && wide(q.D, {q.gy[0], q.gy[1], q.gy[2], q.gx, q.glast});
  q.slice = slice_of(q.T, q.B * groups(q));
  const Tensor sums = want_mix ? at::empty({q.B * parts(q), q.count, q.D}, x.options().dtype(at::kFloat)) : Tensor();
  q.gmix = want_mix ? floats(sums) : nullptr;
  Launch{device, stream}.threads("fused_mix_gradient_" + dtype(x), q.B * parts(q) * groups(q), q);
  return {gx, glast, want_mix ? sums.sum(0) : Tensor()};
}

// ---- gates, squared ReLU, dropout: element by element ----

Tensor gate_forward(const Optional<Tensor>& x, const Tensor& r, const Tensor& v, int64_t device, int64_t stream) {
  contiguous(r, "r");
  alike(v, "v", r);
  if (given(x)) check(*x, "x", r, x->scalar_type(), r.sizes());
  const Tensor& of = given(x) ? *x : r;
  const Tensor y = at::empty_like(of);
  FusedGate q{};
  q.N = r.numel(), q.x = data(given(x)), q.r = r.data_ptr(), q.v = v.data_ptr(), q.y = y.data_ptr();
  q.wide = wide(q.N, {q.x, q.r, q.v, q.y});
  Launch{device, stream}.threads("fused_gate_" + pair(of, r), q.N / width(q.wide), q);
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& g, const Tensor& r, const Tensor& v, int64_t device, int64_t stream) {
  contiguous(r, "r");
  alike(v, "v", r);
  check(g, "g", r, g.scalar_type(), r.sizes());
  const Tensor gr = at::empty_like(r), gv = at::empty_like(v);
  FusedGate q{};
  q.N = r.numel(), q.g = g.data_ptr(), q.r = r.data_ptr(), q.v = v.data_ptr(), q.gr = gr.data_ptr(), q.gv = gv.data_ptr();
  q.wide = wide(q.N, {q.g, q.r, q.v, q.gr, q.gv});
  Launch{device, stream}.threads("fused_gate_gradient_" + pair(g, r), q.N / width(q.wide), q);
  return {gr, gv};
}

// k, and g if it is given, to y.
void each(const std::string& kernel, FusedEach q, const Tensor& k, const Tensor* g, const Tensor& y, const Launch& launch) {
  contiguous(k, "k");
  alike(y, "y", k);
  if (g) alike(*g, "g", k);
  q.N = k.numel(), q.k = k.data_ptr(), q.g = data(g), q.y = y.data_ptr();
  q.wide = wide(q.N, {q.k, q.g, q.y});
  launch.threads("fused_" + kernel + "_" + dtype(k), q.N / width(q.wide), q);
}

Tensor relu2_forward(const Tensor& k, int64_t device, int64_t stream) {
  const Tensor y = at::empty_like(k);
  each("relu2", {}, k, nullptr, y, {device, stream});
  return y;
}
Tensor relu2_backward(const Tensor& g, const Tensor& k, int64_t device, int64_t stream) {
  const Tensor gk = at::empty_like(k);
  each("relu2_gradient", {}, k, &g, gk, {device, stream});
  return gk;
}

void drop(const Tensor& x, const Tensor& y, bool add, int64_t seed, double p, const Launch& launch) {
  TORCH_CHECK(p >= 0 && p < 1, "p must be at least 0 and less than 1; it is ", p);
  FusedEach q{};
  q.add = add, q.seed = unsigned(seed), q.below = unsigned(p * 4294967296.0), q.scale = float(1 / (1 - p));
  each("dropout", q, x, nullptr, y, launch);
}
Tensor dropout(const Tensor& x, int64_t seed, double p, int64_t device, int64_t stream) {
  const Tensor y = at::empty_like(x);
  drop(x, y, false, seed, p, {device, stream});
  return y;
}
void dropout_add(const Tensor& y, const Tensor& x, int64_t seed, double p, int64_t device, int64_t stream) { drop(x, y, true, seed, p, {device, stream}); }

// ---- loss: a target outside the vocabulary makes it NaN, as only the device sees targets ----

Tensor loss(const Tensor& logits, const Tensor& target, double pull, bool gradient, int64_t device, int64_t stream) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous [N, V]; they are ", logits.sizes());
  const int64_t N = logits.size(0);
  check(target, "target", logits, at::kLong, {N});
  const Tensor stats = at::empty({N, 3}, logits.options().dtype(at::kFloat));
  FusedLoss q{};
  q.V = logits.size(1), q.logits = logits.data_ptr(), q.target = static_cast<const long long*>(target.data_ptr()), q.stats = floats(stats);
  q.pull = float(pull), q.gradient = gradient, q.wide = wide(q.V, {q.logits});
  Launch{device, stream}.blocks("fused_loss_" + dtype(logits), N, row_threads(q.V, q.wide), q);
  return stats;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv, library) {
  const std::string where = ", int device, int stream) -> ";
  library.def(("cuda_norm_forward(Tensor x, Tensor w, Tensor b, float eps, ScalarType inside" + where + "(Tensor y, Tensor stats)").c_str(), norm_forward);
  library.def(("cuda_norm_backward(Tensor gy, Tensor? past, Tensor x, Tensor w, Tensor stats, bool affine" + where + "(Tensor gx, Tensor gw, Tensor gb)").c_str(),
              norm_backward);
  library.def(("cuda_mix_forward(Tensor x, Tensor last, Tensor? reset, Tensor mix" + where + "Tensor[]").c_str(), mix_forward);
  library.def(("cuda_mix_backward(Tensor[] gy, Tensor x, Tensor last, Tensor? reset, Tensor mix, bool want_mix" + where + "(Tensor gx, Tensor glast, Tensor gmix)").c_str(),
              mix_backward);
  library.def(("cuda_gate_forward(Tensor? x, Tensor r, Tensor v" + where + "Tensor").c_str(), gate_forward);
  library.def(("cuda_gate_backward(Tensor g, Tensor r, Tensor v" + where + "(Tensor gr, Tensor gv)").c_str(), gate_backward);
  library.def(("cuda_relu2_forward(Tensor k" + where + "Tensor").c_str(), relu2_forward);
  library.def(("cuda_relu2_backward(Tensor g, Tensor k" + where + "Tensor").c_str(), relu2_backward);
  library.def(("cuda_dropout(Tensor x, int seed, float p" + where + "Tensor").c_str(), dropout);
  library.def(("cuda_dropout_add(Tensor(a!) y, Tensor x, int seed, float p" + where + "()").c_str(), dropout_add);
  library.def(("cuda_loss(Tensor(a!) logits, Tensor target, float pull, bool gradient" + where + "Tensor").c_str(), loss);
}
