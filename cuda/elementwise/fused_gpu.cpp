// torch.ops.rwkv.cuda_norm_*, cuda_mix_*, ...: as fused.cpp, with the device and the stream to
// launch on. Only the tensors' pointers are used, so tests can run the kernels on a CPU. Nothing
// synchronises with the device.

#include <algorithm>
#include <string>

#include "elementwise/fused_args.h"
#include "elementwise/shift_args.h"
#include "common/launcher.h"
#include "common/operations.h"

namespace gpu {
namespace {

constexpr int64_t TARGET_THREADS = 1 << 16;  // enough to fill a GPU; with more, each takes more rows
constexpr int64_t MIN_ROWS = 16;             // per partial sum, to keep the partial sums small
constexpr int64_t MIN_BLOCKS = 2048;         // of kernels with a few rows per block: several per multiprocessor
constexpr int64_t MAX_ROWS = 4;              // of such a block: enough to read ahead

FusedDtype dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DTYPE_FP32;
    case at::kBFloat16: return DTYPE_BF16;
    case at::kHalf: return DTYPE_FP16;
    default: TORCH_CHECK(false, "the CUDA kernels take fp32, bf16 or fp16; got ", x.scalar_type());
  }
}
// The kernel for these dtypes, or the scalar one for any dtype.
std::string kernel_name(const std::string& operation, int x_dtype, int y_dtype, bool vectorized) {
  const char* const names[] = {"fp32", "bf16", "fp16"};
  const std::string a = names[x_dtype], b = names[y_dtype];
  TORCH_CHECK(a == b || x_dtype == DTYPE_FP32, "LayerNorm of ", a, " inputs returns ", a, ", not ", b);
  return "fused_" + operation + "_" + (!vectorized ? "any" : a == b ? a : a + "_" + b);
}
void check(const Tensor& x, const char* name, const Tensor& like, at::ScalarType type, at::IntArrayRef sizes) {
  TORCH_CHECK(x.is_contiguous() && x.device() == like.device() && x.scalar_type() == type && x.sizes() == sizes, name,
              " must be a contiguous ", type, " tensor of sizes ", sizes, " on ", like.device(), "; got ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device());
}
void check_like(const Tensor& x, const char* name, const Tensor& other) {
  check(x, name, other, other.scalar_type(), other.sizes());
}
void contiguous(const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_contiguous() && x.dim() >= 1, name, " must be contiguous");
}
void* ptr(const Tensor* x) { return x ? x->data_ptr() : nullptr; }
float* fp32_ptr(const Tensor& x) { return x.data_ptr<float>(); }

// Whether rows of this length at these addresses (null: absent) can be accessed 16 bytes at a time.
bool vectorized(int64_t length, std::initializer_list<const void*> pointers) {
  return length % FUSED_WIDTH == 0 && std::all_of(pointers.begin(), pointers.end(), [](const void* p) {
           return reinterpret_cast<uintptr_t>(p) % 16 == 0;
         });
}
int64_t width(bool vectorized) { return vectorized ? FUSED_WIDTH : 1; }
int row_threads(int64_t length, bool vectorized, int64_t most) {
  return int(std::min(most, (length / width(vectorized) + 31) / 32 * 32));
}

struct Launch {
  int64_t device, stream;
  template <class Args> void blocks(const std::string& kernel, int64_t count, int threads, const Args& args) const {
    if (count) launcher::launch(device, reinterpret_cast<void*>(stream), kernel, count, threads, &args);
  }
  template <class Args> void threads(const std::string& kernel, int64_t count, const Args& args) const {
    blocks(kernel, (count + FUSED_THREADS - 1) / FUSED_THREADS, FUSED_THREADS, args);
  }
};

// Rows per thread, if `parallel` threads can work on each row. Depends on the shape only, so that
// sums have a fixed order.
int64_t slice_of(int64_t rows, int64_t parallel) { return std::max(MIN_ROWS, rows * parallel / TARGET_THREADS); }

// One block per `rows` rows, as wide as a row.
void launch_norm(const std::string& operation, FusedNorm& q, bool vectorized, const Launch& launch) {
  TORCH_CHECK(q.D < int64_t(1) << 30, "LayerNorm is over less than 2^30 channels");
  q.rows = (int)std::clamp<int64_t>(q.N / MIN_BLOCKS, 1, MAX_ROWS);
  launch.blocks(kernel_name(operation, q.x_dtype, q.y_dtype, vectorized), (q.N + q.rows - 1) / q.rows,
                row_threads(q.D, vectorized, FUSED_ROW_THREADS), q);
}

}  // namespace

// ---- LayerNorm ----

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps,
                                        at::ScalarType y_dtype, int64_t device, int64_t stream) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", x, at::kFloat, {D});
  check(b, "b", x, at::kFloat, {D});
  const Tensor y = x.new_empty(x.sizes(), x.options().dtype(y_dtype)),
               stats = x.new_empty({N, 2}, x.options().dtype(at::kFloat));
  FusedNorm q{};
  q.N = N, q.D = D, q.x = x.data_ptr(), q.w = fp32_ptr(w), q.b = fp32_ptr(b), q.eps = float(eps), q.y = y.data_ptr(),
  q.stats = fp32_ptr(stats);
  q.x_dtype = dtype(x), q.y_dtype = dtype(y);
  launch_norm("norm", q, vectorized(D, {q.x, q.w, q.b, q.y}), {device, stream});
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                 const Tensor& stats, bool affine, int64_t device, int64_t stream) {
  contiguous(x, "x");
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  check(w, "w", x, at::kFloat, {D});
  check(gy, "gy", x, gy.scalar_type(), x.sizes());
  check(stats, "stats", x, at::kFloat, {N, 2});
  const Tensor gx = x.new_empty(x.sizes());
  FusedNorm q{};
  q.N = N, q.D = D, q.x = x.data_ptr(), q.w = fp32_ptr(w), q.stats = fp32_ptr(stats), q.gy = gy.data_ptr(),
  q.gx = gx.data_ptr();
  q.x_dtype = dtype(x), q.y_dtype = dtype(gy);
  const bool vec = vectorized(D, {q.x, q.w, q.gy, q.gx});
  const Launch launch{device, stream};
  launch_norm("norm_gradient", q, vec, launch);
  if (!affine) return {gx, Tensor(), Tensor()};
  q.slice = slice_of(N, D / width(vec));
  const int64_t slices = (N + q.slice - 1) / q.slice;
  const Tensor sums = x.new_empty({2, slices, D}, x.options().dtype(at::kFloat));
  q.gw = fp32_ptr(sums), q.gb = q.gw + slices * D;
  launch.threads(kernel_name("norm_sums", q.x_dtype, q.y_dtype, vec), slices * (D / width(vec)), q);
  const Tensor total = sums.sum(1);
  return {gx, total[0], total[1]};
}

// ---- token shift and mixing ----

static FusedMix mix_of(const Tensor& x, const Tensor& last, const Tensor* initial, const Tensor* reset,
                       const Tensor& mix) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [B, T, D]; got ", x.sizes());
  TORCH_CHECK(mix.dim() == 2 && mix.size(0) >= 1 && mix.size(0) <= 3, "mix must be [1 to 3, D]; got ", mix.sizes());
  FusedMix q{};
  q.B = x.size(0), q.T = x.size(1), q.D = x.size(2), q.count = int(mix.size(0));
  check(last, "last", x, x.scalar_type(), {q.B, q.D});
  if (initial) check(*initial, "initial", x, x.scalar_type(), {q.B, q.D});
  check(mix, "mix", x, at::kFloat, {q.count, q.D});
  if (reset) check(*reset, "reset", x, at::kBool, {q.B, q.T});
  q.x = x.data_ptr(), q.last = last.data_ptr(), q.mix = fp32_ptr(mix),
  q.reset = static_cast<const unsigned char*>(ptr(reset));
  q.initial = initial ? initial->data_ptr() : q.last;
  q.dtype = dtype(x);
  return q;
}
template <class Args> static int64_t parts(const Args& q) { return (q.T + q.slice - 1) / q.slice; }

struct Drop { const long long* seed; unsigned below; float scale; };
static Drop drop_of(const Tensor& x, const Tensor& seed, double p) {
  TORCH_CHECK(p >= 0 && p < 1, "p must be at least 0 and less than 1; got ", p);
  check(seed, "seed", x, at::kLong, {});
  return {static_cast<const long long*>(seed.data_ptr()), unsigned(p * 4294967296.0), float(1 / (1 - p))};
}

// New tensors for what a kernel writes, entered in q: its mixtures if wanted, then the dropouts of those whose p is not
// 0. `p` has one element per mixture, or none.
template <class Args>
static std::vector<Tensor> outputs(Args& q, const Tensor& x, at::TensorList seeds, at::ArrayRef<double> p,
                                   bool want_y) {
  TORCH_CHECK(p.empty() || int(p.size()) == q.count, "there must be one probability per mixture");
  std::vector<Tensor> y;
  for (int i = 0; want_y && i < q.count; i++) y.push_back(x.new_empty(x.sizes())), q.y[i] = y.back().data_ptr();
  size_t used = 0;
  for (size_t i = 0; i < p.size(); i++) {
    if (p[i] == 0) continue;
    TORCH_CHECK(used < seeds.size(), "there must be one seed per dropout");
    const Drop drop = drop_of(x, seeds[used++], p[i]);
    q.seed[i] = drop.seed, q.below[i] = drop.below, q.scale[i] = drop.scale;
    y.push_back(x.new_empty(x.sizes())), q.dropped[i] = y.back().data_ptr();
  }
  return y;
}

static void launch_mix(FusedMix& q, const Launch& launch) {
  const bool vec = vectorized(q.D, {q.x, q.last, q.initial, q.mix, q.y[0], q.y[1], q.y[2], q.dropped[0], q.dropped[1],
                                    q.dropped[2]});
  const int64_t groups = q.D / width(vec);
  q.slice = slice_of(q.T, q.B * groups);
  launch.threads(kernel_name("mix", q.dtype, q.dtype, vec), q.B * parts(q) * groups, q);
}

std::vector<Tensor> mix_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial,
                                const Optional<Tensor>& reset, const Tensor& mix, int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, or_null(initial), or_null(reset), mix);
  const std::vector<Tensor> y = outputs(q, x, {}, {}, true);
  launch_mix(q, {device, stream});
  return y;
}

std::vector<Tensor> mix_dropout_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial,
                                        const Optional<Tensor>& reset, const Tensor& mix, at::TensorList seeds,
                                        at::ArrayRef<double> p, bool want_y, int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, or_null(initial), or_null(reset), mix);
  const std::vector<Tensor> y = outputs(q, x, seeds, p, want_y);
  launch_mix(q, {device, stream});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(at::TensorList gy, const Tensor& x, const Tensor& last,
                                                const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                                const Tensor& mix, bool want_mix, int64_t device, int64_t stream) {
  FusedMix q = mix_of(x, last, or_null(initial), or_null(reset), mix);
  TORCH_CHECK(int(gy.size()) == q.count, "there must be one gradient per mix");
  for (int i = 0; i < q.count; i++) check_like(gy[i], "gy", x), q.gy[i] = gy[i].data_ptr();
  const Tensor gx = x.new_empty(x.sizes()), glast = last.new_empty(last.sizes());
  q.gx = gx.data_ptr(), q.glast = glast.data_ptr();
  const bool vec = vectorized(q.D, {q.x, q.last, q.initial, q.mix, q.gy[0], q.gy[1], q.gy[2], q.gx, q.glast});
  const int64_t groups = q.D / width(vec);
  q.slice = slice_of(q.T, q.B * groups);
  const Tensor sums = want_mix ? x.new_empty({q.B * parts(q), q.count, q.D}, x.options().dtype(at::kFloat)) : Tensor();
  q.gmix = want_mix ? fp32_ptr(sums) : nullptr;
  Launch{device, stream}.threads(kernel_name("mix_gradient", q.dtype, q.dtype, vec), q.B * parts(q) * groups, q);
  return {gx, glast, want_mix ? sums.sum(0) : Tensor()};
}

// ---- token shift of RWKV-6 ----

static ShiftArgs shift_of(const Tensor& x, const Tensor& last, const Tensor* reset, const Tensor& mix,
                          const Tensor& parts) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x must be contiguous [B, T, D]; got ", x.sizes());
  TORCH_CHECK(mix.dim() == 2 && mix.size(0) >= 1 && mix.size(0) <= SHIFT_MAX, "mix must be [1 to ", SHIFT_MAX,
              ", D]; got ", mix.sizes());
  ShiftArgs q{};
  q.B = x.size(0), q.T = x.size(1), q.D = x.size(2), q.count = int(mix.size(0)), q.dtype = dtype(x);
  check(last, "last", x, x.scalar_type(), {q.B, q.D});
  if (reset) check(*reset, "reset", x, at::kBool, {q.B, q.T});
  check(mix, "mix", x, at::kFloat, {q.count, q.D});
  check(parts, "parts", x, x.scalar_type(), {q.count, q.B, q.T, q.D});
  q.x = x.data_ptr(), q.last = last.data_ptr(), q.reset = static_cast<const unsigned char*>(ptr(reset));
  q.mix = fp32_ptr(mix), q.parts = parts.data_ptr();
  return q;
}

std::vector<Tensor> shift_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& reset, const Tensor& mix,
                                  const Tensor& parts_, at::TensorList seeds, at::ArrayRef<double> p, bool want_y,
                                  int64_t device, int64_t stream) {
  ShiftArgs q = shift_of(x, last, or_null(reset), mix, parts_);
  const std::vector<Tensor> y = outputs(q, x, seeds, p, want_y);
  const bool vec = vectorized(q.D, {q.x, q.last, q.mix, q.parts, q.y[0], q.y[1], q.y[2], q.y[3], q.y[4], q.dropped[0],
                                    q.dropped[1], q.dropped[2], q.dropped[3], q.dropped[4]});
  const int64_t groups = q.D / width(vec);
  q.slice = slice_of(q.T, q.B * groups);
  Launch{device, stream}.threads(kernel_name("shift", q.dtype, q.dtype, vec), q.B * parts(q) * groups, q);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shift_backward(at::TensorList gy, const Tensor& x, const Tensor& last,
                                                          const Optional<Tensor>& reset, const Tensor& mix,
                                                          const Tensor& parts_, bool want_mix, int64_t device,
                                                          int64_t stream) {
  ShiftArgs q = shift_of(x, last, or_null(reset), mix, parts_);
  TORCH_CHECK(int(gy.size()) == q.count, "there must be one gradient per mixture");
  for (int i = 0; i < q.count; i++) check_like(gy[i], "gy", x), q.gy[i] = gy[i].data_ptr();
  const Tensor gx = x.new_empty(x.sizes()), glast = last.new_empty(last.sizes()),
               gparts = parts_.new_empty(parts_.sizes());
  q.gx = gx.data_ptr(), q.glast = glast.data_ptr(), q.gparts = gparts.data_ptr();
  const bool vec = vectorized(q.D, {q.x, q.last, q.mix, q.parts, q.gy[0], q.gy[1], q.gy[2], q.gy[3], q.gy[4], q.gx,
                                    q.glast, q.gparts});
  const int64_t groups = q.D / width(vec);
  q.slice = slice_of(q.T, q.B * groups);
  const Tensor sums = want_mix ? mix.new_empty({q.B * parts(q), q.count, q.D}) : Tensor();
  q.gmix = want_mix ? fp32_ptr(sums) : nullptr;
  Launch{device, stream}.threads(kernel_name("shift_gradient", q.dtype, q.dtype, vec), q.B * parts(q) * groups, q);
  return {gx, glast, gparts, want_mix ? sums.sum(0) : Tensor()};
}

// ---- gates, squared ReLU, dropout ----

Tensor gate_forward(const Tensor& r, const Tensor& v, int64_t device, int64_t stream) {
  contiguous(r, "r");
  check_like(v, "v", r);
  const Tensor y = r.new_empty(r.sizes());
  FusedGate q{};
  q.N = r.numel(), q.r = r.data_ptr(), q.v = v.data_ptr(), q.y = y.data_ptr(), q.dtype = dtype(r);
  const bool vec = vectorized(q.N, {q.r, q.v, q.y});
  Launch{device, stream}.threads(kernel_name("gate", q.dtype, q.dtype, vec), q.N / width(vec), q);
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& g, const Tensor& r, const Tensor& v, int64_t device,
                                         int64_t stream) {
  contiguous(r, "r");
  check_like(v, "v", r);
  check_like(g, "g", r);
  const Tensor gr = r.new_empty(r.sizes()), gv = v.new_empty(v.sizes());
  FusedGate q{};
  q.N = r.numel(), q.g = g.data_ptr(), q.r = r.data_ptr(), q.v = v.data_ptr(), q.gr = gr.data_ptr(),
  q.gv = gv.data_ptr();
  q.dtype = dtype(r);
  const bool vec = vectorized(q.N, {q.g, q.r, q.v, q.gr, q.gv});
  Launch{device, stream}.threads(kernel_name("gate_gradient", q.dtype, q.dtype, vec), q.N / width(vec), q);
  return {gr, gv};
}

// y = operation(k), or operation(k, g).
static void launch_elementwise(const std::string& operation, FusedEach q, const Tensor& k, const Tensor* g,
                               const Tensor& y, const Launch& launch) {
  contiguous(k, "k");
  check_like(y, "y", k);
  if (g) check_like(*g, "g", k);
  q.N = k.numel(), q.k = k.data_ptr(), q.g = ptr(g), q.y = y.data_ptr(), q.dtype = dtype(k);
  const bool vec = vectorized(q.N, {q.k, q.g, q.y});
  launch.threads(kernel_name(operation, q.dtype, q.dtype, vec), q.N / width(vec), q);
}

Tensor relu2_forward(const Tensor& k, int64_t device, int64_t stream) {
  const Tensor y = k.new_empty(k.sizes());
  launch_elementwise("relu2", {}, k, nullptr, y, {device, stream});
  return y;
}
Tensor relu2_backward(const Tensor& g, const Tensor& k, int64_t device, int64_t stream) {
  const Tensor gk = k.new_empty(k.sizes());
  launch_elementwise("relu2_gradient", {}, k, &g, gk, {device, stream});
  return gk;
}

static void drop(const Tensor& x, const Tensor& y, bool add, const Tensor& seed, double p, const Launch& launch) {
  const Drop drop = drop_of(x, seed, p);
  FusedEach q{};
  q.add = add, q.seed = drop.seed, q.below = drop.below, q.scale = drop.scale;
  launch_elementwise("dropout", q, x, nullptr, y, launch);
}
Tensor dropout(const Tensor& x, const Tensor& seed, double p, int64_t device, int64_t stream) {
  const Tensor y = x.new_empty(x.sizes());
  drop(x, y, false, seed, p, {device, stream});
  return y;
}
void dropout_add(const Tensor& y, const Tensor& x, const Tensor& seed, double p, int64_t device, int64_t stream) {
  drop(x, y, true, seed, p, {device, stream});
}

// ---- loss: NaN for a target outside the vocabulary, as checking on the host would synchronise ----

Tensor loss(const Tensor& logits, const Tensor& target, double l2wrap, bool gradient, int64_t device, int64_t stream) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && logits.stride(0) >= logits.size(1),
              "logits must be [N, V] with contiguous rows; got ", logits.sizes(), " with strides ", logits.strides());
  const int64_t N = logits.size(0);
  check(target, "target", logits, at::kLong, {N});
  const Tensor stats = logits.new_empty({N, 3}, logits.options().dtype(at::kFloat));
  FusedLoss q{};
  q.V = logits.size(1), q.stride = logits.stride(0), q.logits = logits.data_ptr();
  q.target = static_cast<const long long*>(target.data_ptr()), q.stats = fp32_ptr(stats);
  q.l2wrap = float(l2wrap), q.gradient = gradient, q.dtype = dtype(logits);
  const bool vec = vectorized(q.stride, {q.logits});
  Launch{device, stream}.blocks(kernel_name("loss", q.dtype, q.dtype, vec), N,
                                row_threads(q.stride, vec, FUSED_LOSS_THREADS), q);
  return stats;
}

}  // namespace gpu
