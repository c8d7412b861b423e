// The fused operations' kernels as torch sees them: torch.ops.rwkv.cuda_norm_*, cuda_mix_*, ..., as in fused.cpp, and the device and stream to launch
// on. Tensors are only pointers here, which lets tests run the kernels on a CPU. Nothing waits for the device.

#include <algorithm>
#include <string>

#include "elementwise/fused_args.h"
#include "common/launcher.h"
#include "common/operations.h"

namespace gpu {
namespace {

constexpr int64_t BUSY = 1 << 16;  // threads that a GPU is given before they share out rows less finely
constexpr int64_t LEAST = 16;      // rows that share a sum, at least: so sums over rows take little room

FusedDtype dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DTYPE_FP32;
    case at::kBFloat16: return DTYPE_BF16;
    case at::kHalf: return DTYPE_FP16;
    default: TORCH_CHECK(false, "the CUDA unit takes fp32, bf16 or fp16; it got ", x.scalar_type());
  }
}
// The kernel of an operation: the one of these dtypes, or, for rows that are read number by number, the one of any.
std::string named(const std::string& operation, int stream, int inside, bool wide) {
  const char* const names[] = {"fp32", "bf16", "fp16"};
  const std::string a = names[stream], b = names[inside];
  TORCH_CHECK(a == b || stream == DTYPE_FP32, "a residual stream in ", a, " goes with ", a, " inside the blocks, not with ", b);
  return "fused_" + operation + "_" + (!wide ? "any" : a == b ? a : a + "_" + b);
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

}  // namespace

// ---- LayerNorm ----

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps, at::ScalarType inside, int64_t device, int64_t stream) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", x, at::kFloat, {D});
  check(b, "b", x, at::kFloat, {D});
  const Tensor y = x.new_empty(x.sizes(), x.options().dtype(inside)), stats = x.new_empty({N, 2}, x.options().dtype(at::kFloat));
  FusedNorm q{};
  q.N = N, q.D = D, q.x = x.data_ptr(), q.w = floats(w), q.b = floats(b), q.eps = float(eps), q.y = y.data_ptr(), q.stats = floats(stats);
  q.stream = dtype(x), q.inside = dtype(y);
  const bool whole = wide(D, {q.x, q.w, q.b, q.y});
  Launch{device, stream}.blocks(named("norm", q.stream, q.inside, whole), N, row_threads(D, whole), q);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Tensor& x, const Tensor& w, const Tensor& stats, bool affine,
                                                 int64_t device, int64_t stream) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", x, at::kFloat, {D});
  check(gy, "gy", x, gy.scalar_type(), x.sizes());
  check(stats, "stats", x, at::kFloat, {N, 2});
  const Tensor gx = x.new_empty(x.sizes());
  FusedNorm q{};
  q.N = N, q.D = D, q.x = x.data_ptr(), q.w = floats(w), q.stats = floats(stats), q.gy = gy.data_ptr(), q.gx = gx.data_ptr();
  q.stream = dtype(x), q.inside = dtype(gy);
  const bool whole = wide(D, {q.x, q.w, q.gy, q.gx});
  const Launch launch{device, stream};
  launch.blocks(named("norm_gradient", q.stream, q.inside, whole), N, row_threads(D, whole), q);
  if (!affine) return {gx, Tensor(), Tensor()};
  q.slice = slice_of(N, D / width(whole));
  const int64_t slices = (N + q.slice - 1) / q.slice;
  const Tensor sums = x.new_empty({2, slices, D}, x.options().dtype(at::kFloat));
  q.gw = floats(sums), q.gb = q.gw + slices * D;
  launch.threads(named("norm_sums", q.stream, q.inside, whole), slices * (D / width(whole)), q);
  const Tensor total = sums.sum(1);
  return {gx, total[0], total[1]};
}

// ---- token shift and mixing ----

static FusedMix mix_of(const Tensor& x, const Tensor& last, const Tensor* initial, const Tensor* reset, const Tensor& mix) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [B, T, D]; it is ", x.sizes());
  TORCH_CHECK(mix.dim() == 2 && mix.size(0) >= 1 && mix.size(0) <= 3, "mix must be [1 to 3, D]; it is ", mix.sizes());
  FusedMix q{};
  q.B = x.size(0), q.T = x.size(1), q.D = x.size(2), q.count = int(mix.size(0));
  check(last, "last", x, x.scalar_type(), {q.B, q.D});
  if (initial) check(*initial, "initial", x, x.scalar_type(), {q.B, q.D});
  check(mix, "mix", x, at::kFloat, {q.count, q.D});
  if (reset) check(*reset, "reset", x, at::kBool, {q.B, q.T});
  q.x = x.data_ptr(), q.last = last.data_ptr(), q.mix = floats(mix), q.reset = static_cast<const unsigned char*>(data(reset));
  q.initial = initial ? initial->data_ptr() : q.last;
  q.dtype = dtype(x);
  return q;
}
static int64_t parts(const FusedMix& q) { return (q.T + q.slice - 1) / q.slice; }

std::vector<Tensor> mix_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial, const Optional<Tensor>& reset, const Tensor& mix, int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, given(initial), given(reset), mix);
  std::vector<Tensor> y;
  for (int i = 0; i < q.count; i++) y.push_back(x.new_empty(x.sizes())), q.y[i] = y.back().data_ptr();
  const bool whole = wide(q.D, {q.x, q.last, q.initial, q.mix, q.y[0], q.y[1], q.y[2]});
  const int64_t groups = q.D / width(whole);
  q.slice = slice_of(q.T, q.B * groups);
  Launch{device, stream}.threads(named("mix", q.dtype, q.dtype, whole), q.B * parts(q) * groups, q);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(at::TensorList gy, const Tensor& x, const Tensor& last, const Optional<Tensor>& initial, const Optional<Tensor>& reset, const Tensor& mix, bool want_mix,
                                                int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, given(initial), given(reset), mix);
  TORCH_CHECK(int(gy.size()) == q.count, "as many gradients as mixes");
  for (int i = 0; i < q.count; i++) alike(gy[i], "gy", x), q.gy[i] = gy[i].data_ptr();
  const Tensor gx = x.new_empty(x.sizes()), glast = last.new_empty(last.sizes());
  q.gx = gx.data_ptr(), q.glast = glast.data_ptr();
  const bool whole = wide(q.D, {q.x, q.last, q.initial, q.mix, q.gy[0], q.gy[1], q.gy[2], q.gx, q.glast});
  const int64_t groups = q.D / width(whole);
  q.slice = slice_of(q.T, q.B * groups);
  const Tensor sums = want_mix ? x.new_empty({q.B * parts(q), q.count, q.D}, x.options().dtype(at::kFloat)) : Tensor();
  q.gmix = want_mix ? floats(sums) : nullptr;
  Launch{device, stream}.threads(named("mix_gradient", q.dtype, q.dtype, whole), q.B * parts(q) * groups, q);
  return {gx, glast, want_mix ? sums.sum(0) : Tensor()};
}

// ---- gates, squared ReLU, dropout: element by element ----

Tensor gate_forward(const Tensor& r, const Tensor& v, int64_t device, int64_t stream) {
  contiguous(r, "r");
  alike(v, "v", r);
  const Tensor y = r.new_empty(r.sizes());
  FusedGate q{};
  q.N = r.numel(), q.r = r.data_ptr(), q.v = v.data_ptr(), q.y = y.data_ptr(), q.dtype = dtype(r);
  const bool whole = wide(q.N, {q.r, q.v, q.y});
  Launch{device, stream}.threads(named("gate", q.dtype, q.dtype, whole), q.N / width(whole), q);
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& g, const Tensor& r, const Tensor& v, int64_t device, int64_t stream) {
  contiguous(r, "r");
  alike(v, "v", r);
  alike(g, "g", r);
  const Tensor gr = r.new_empty(r.sizes()), gv = v.new_empty(v.sizes());
  FusedGate q{};
  q.N = r.numel(), q.g = g.data_ptr(), q.r = r.data_ptr(), q.v = v.data_ptr(), q.gr = gr.data_ptr(), q.gv = gv.data_ptr();
  q.dtype = dtype(r);
  const bool whole = wide(q.N, {q.g, q.r, q.v, q.gr, q.gv});
  Launch{device, stream}.threads(named("gate_gradient", q.dtype, q.dtype, whole), q.N / width(whole), q);
  return {gr, gv};
}

// k, and g if it is given, to y.
static void each(const std::string& operation, FusedEach q, const Tensor& k, const Tensor* g, const Tensor& y, const Launch& launch) {
  contiguous(k, "k");
  alike(y, "y", k);
  if (g) alike(*g, "g", k);
  q.N = k.numel(), q.k = k.data_ptr(), q.g = data(g), q.y = y.data_ptr(), q.dtype = dtype(k);
  const bool whole = wide(q.N, {q.k, q.g, q.y});
  launch.threads(named(operation, q.dtype, q.dtype, whole), q.N / width(whole), q);
}

Tensor relu2_forward(const Tensor& k, int64_t device, int64_t stream) {
  const Tensor y = k.new_empty(k.sizes());
  each("relu2", {}, k, nullptr, y, {device, stream});
  return y;
}
Tensor relu2_backward(const Tensor& g, const Tensor& k, int64_t device, int64_t stream) {
  const Tensor gk = k.new_empty(k.sizes());
  each("relu2_gradient", {}, k, &g, gk, {device, stream});
  return gk;
}

static void drop(const Tensor& x, const Tensor& y, bool add, int64_t seed, double p, const Launch& launch) {
  TORCH_CHECK(p >= 0 && p < 1, "p must be at least 0 and less than 1; it is ", p);
  FusedEach q{};
  q.add = add, q.seed = unsigned(seed), q.below = unsigned(p * 4294967296.0), q.scale = float(1 / (1 - p));
  each("dropout", q, x, nullptr, y, launch);
}
Tensor dropout(const Tensor& x, int64_t seed, double p, int64_t device, int64_t stream) {
  const Tensor y = x.new_empty(x.sizes());
  drop(x, y, false, seed, p, {device, stream});
  return y;
}
void dropout_add(const Tensor& y, const Tensor& x, int64_t seed, double p, int64_t device, int64_t stream) { drop(x, y, true, seed, p, {device, stream}); }

// ---- loss: a target outside the vocabulary makes it NaN, as only the device sees targets ----

Tensor loss(const Tensor& logits, const Tensor& target, double pull, bool gradient, int64_t device, int64_t stream) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous [N, V]; they are ", logits.sizes());
  const int64_t N = logits.size(0);
  check(target, "target", logits, at::kLong, {N});
  const Tensor stats = logits.new_empty({N, 3}, logits.options().dtype(at::kFloat));
  FusedLoss q{};
  q.V = logits.size(1), q.logits = logits.data_ptr(), q.target = static_cast<const long long*>(target.data_ptr()), q.stats = floats(stats);
  q.pull = float(pull), q.gradient = gradient, q.dtype = dtype(logits);
  const bool whole = wide(q.V, {q.logits});
  Launch{device, stream}.blocks(named("loss", q.dtype, q.dtype, whole), N, row_threads(q.V, whole), q);
  return stats;
}

}  // namespace gpu
