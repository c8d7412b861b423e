// torch.ops.rwkv.cuda_keys_*, cuda_head_gate_*: the time-mix of RWKV-5 to 7 around WKV on a GPU, with
// the device and the stream to launch on. (On CPUs it is a few operations of torch.) Only the
// tensors' pointers are used, so tests can run the kernels on a CPU. Nothing synchronises.
#include <algorithm>
#include <string>

#include "common/heads.h"
#include "common/launcher.h"
#include "elementwise/time_mix_args.h"

namespace gpu {
namespace {

using arguments::floats;
using heads::aligned;

constexpr int64_t WARPS = TIME_MIX_THREADS / 32;
constexpr int64_t SUMMED = 16;  // tokens per warp, where it sums the gradients of parameters

// The tokens, heads and elements of x [B, T, H, N] or [B, T, C] with parameters [H, N].
TimeMixShape shape_of(const char* op, const Tensor& x, const Tensor& by_head, int64_t slice) {
  TORCH_CHECK(by_head.dim() == 2 && by_head.size(1) % 2 == 0 && by_head.size(1) <= TIME_MIX_MAX_N, op,
              ": heads have an even size of at most ", TIME_MIX_MAX_N, " elements; got ", by_head.sizes());
  const int64_t H = by_head.size(0), N = by_head.size(1);
  TORCH_CHECK(x.numel() % (H * N) == 0, op, ": ", x.sizes(), " has not ", H, " heads of ", N, " elements");
  return {x.numel() / (H * N), H, N, slice};
}
int64_t slices(const TimeMixShape& s) { return (s.tokens + s.slice - 1) / s.slice; }

// A tensor like `like`, aligned to pairs of elements.
Tensor input(const char* op, const Tensor& x, const char* name, const Tensor& like, at::ScalarType type) {
  TORCH_CHECK(x.numel() == like.numel() && x.scalar_type() == type && x.is_contiguous(), op, ": ", name,
              " must be a contiguous ", type, " tensor of ", like.numel(), " elements; got ", x.scalar_type(), " ",
              x.sizes());
  return aligned(x);
}

std::string kernel_of(const char* op, const Tensor& x) {
  const std::string name = std::string("fused_") + op + "_";
  switch (x.scalar_type()) {
    case at::kFloat: return name + "fp32";
    case at::kBFloat16: return name + "bf16";
    case at::kHalf: return name + "fp16";
    default: TORCH_CHECK(false, op, ": the CUDA kernels take fp32, bf16 or fp16; got ", x.scalar_type());
  }
}

template <class Args> void launch(const std::string& kernel, const Args& args, int64_t device, int64_t stream) {
  const int64_t warps = slices(args.shape) * args.shape.H;
  if (args.shape.tokens > 0 && args.shape.H > 0)
    launcher::launch(device, reinterpret_cast<void*>(stream), kernel, (warps + WARPS - 1) / WARPS, TIME_MIX_THREADS,
                     &args);
}

struct KeysInputs {
  std::vector<Tensor> kept;
  KeysArgs args{};

  KeysInputs(at::TensorList x, at::TensorList p, int64_t slice) {
    TORCH_CHECK((x.size() == 6 && p.size() == 5) || (x.size() == 4 && p.size() == 4),
                "keys: k, v, w, a, mix, v_first and w0, a0, k_k, k_a, v0, in block 0 without mix, v_first and v0; got ",
                x.size(), " and ", p.size(), " tensors");
    args.shape = shape_of("keys", x[0], p[0], slice);
    const char* const names[] = {"k", "v", "w", "a", "mix", "v_first"};
    const void** const to[] = {&args.k, &args.v, &args.w, &args.a, &args.mix, &args.first};
    for (size_t i = 0; i < x.size(); i++) {
      kept.push_back(input("keys", x[i], names[i], x[0], x[0].scalar_type()));
      *to[i] = kept.back().data_ptr();
    }
    const char* const parameter_names[] = {"w0", "a0", "k_k", "k_a", "v0"};
    const float** const parameters[] = {&args.w0, &args.a0, &args.k_k, &args.k_a, &args.v0};
    for (size_t i = 0; i < p.size(); i++) {
      kept.push_back(input("keys", p[i], parameter_names[i], p[0], at::kFloat));
      *parameters[i] = floats(&kept.back());
    }
  }
};

struct HeadGateInputs {
  std::vector<Tensor> kept;
  HeadGateArgs args{};

  HeadGateInputs(at::TensorList x, at::TensorList p, double eps, int64_t slice) {
    TORCH_CHECK((x.size() == 5 && p.size() == 3) || (x.size() == 2 && p.size() == 2),
                "head_gate: y, g, r, k, v and weight, bias, r_k, or y, g and weight, bias; got ", x.size(), " and ",
                p.size(), " tensors");
    args.shape = shape_of("head_gate", x[0], p[0], slice);
    args.eps = float(eps);
    const char* const names[] = {"y", "g", "r", "k", "v"};
    const void** const to[] = {&args.y, &args.g, &args.r, &args.k, &args.v};
    for (size_t i = 0; i < x.size(); i++) {
      kept.push_back(input("head_gate", x[i], names[i], x[0], x[0].scalar_type()));
      *to[i] = kept.back().data_ptr();
    }
    const char* const parameter_names[] = {"weight", "bias", "r_k"};
    const float** const parameters[] = {&args.weight, &args.bias, &args.r_k};
    for (size_t i = 0; i < p.size(); i++) {
      kept.push_back(input("head_gate", p[i], parameter_names[i], p[0], at::kFloat));
      *parameters[i] = floats(&kept.back());
    }
  }
};

}  // namespace

std::vector<Tensor> keys_forward(at::TensorList x, at::TensorList p, int64_t device, int64_t stream) {
  KeysInputs inputs(x, p, 1);
  KeysArgs& args = inputs.args;
  const Tensor w = x[0].new_empty(x[0].sizes(), x[0].options().dtype(at::kFloat));
  const Tensor k = x[0].new_empty(x[0].sizes()), v = k.new_empty(k.sizes()), a = k.new_empty(k.sizes()),
               b = k.new_empty(k.sizes());
  args.w_out = w.data_ptr<float>();
  args.k_out = k.data_ptr(), args.v_out = v.data_ptr(), args.a_out = a.data_ptr(), args.b_out = b.data_ptr();
  launch(kernel_of("keys", k), args, device, stream);
  return {w, k, v, a, b};
}

std::vector<Tensor> keys_backward(at::TensorList g, at::TensorList x, at::TensorList p, bool affine, int64_t device,
                                  int64_t stream) {
  KeysInputs inputs(x, p, SUMMED);
  KeysArgs& args = inputs.args;
  TORCH_CHECK(g.size() == 7, "keys: the gradients of w, k, v, a, b, and two summands; got ", g.size());
  const at::ScalarType type = x[0].scalar_type();
  const char* const names[] = {"gw", "gk", "gv", "ga", "gb", "gk 2", "gv 2"};
  std::vector<Tensor> given;
  for (size_t i = 0; i < g.size(); i++) given.push_back(input("keys", g[i], names[i], x[0], i ? type : at::kFloat));
  args.gw = floats(&given[0]);
  args.gk[0] = given[1].data_ptr(), args.gk[1] = given[5].data_ptr();
  args.gv[0] = given[2].data_ptr(), args.gv[1] = given[6].data_ptr();
  args.ga = given[3].data_ptr(), args.gb = given[4].data_ptr();
  std::vector<Tensor> found;
  void** const to[] = {&args.gk_in, &args.gv_in, &args.gw_in, &args.ga_in, &args.gmix, &args.gfirst};
  for (size_t i = 0; i < x.size(); i++) {
    found.push_back(x[0].new_empty(x[i].sizes()));
    *to[i] = found.back().data_ptr();
  }
  const int64_t H = args.shape.H, N = args.shape.N;
  const Tensor sums = p[0].new_empty({affine ? slices(args.shape) : 0, 5, H, N});
  if (affine) args.sums = sums.data_ptr<float>();
  launch(kernel_of("keys_gradient", x[0]), args, device, stream);
  if (affine) found.push_back(sums.sum(0));
  return found;
}

Tensor head_gate_forward(at::TensorList x, at::TensorList p, double eps, int64_t device, int64_t stream) {
  HeadGateInputs inputs(x, p, eps, 1);
  const Tensor out = x[1].new_empty(x[1].sizes());
  inputs.args.out = out.data_ptr();
  launch(kernel_of("head_gate", out), inputs.args, device, stream);
  return out;
}

std::vector<Tensor> head_gate_backward(const Tensor& g, at::TensorList x, at::TensorList p, double eps, bool affine,
                                       int64_t device, int64_t stream) {
  HeadGateInputs inputs(x, p, eps, SUMMED);
  HeadGateArgs& args = inputs.args;
  const Tensor given = input("head_gate", g, "g", x[0], x[0].scalar_type());
  args.gout = given.data_ptr();
  std::vector<Tensor> found;
  void** const to[] = {&args.gy, &args.gg, &args.gr, &args.gk, &args.gv};
  for (size_t i = 0; i < x.size(); i++) {
    found.push_back(x[0].new_empty(x[i].sizes()));
    *to[i] = found.back().data_ptr();
  }
  const int64_t H = args.shape.H, N = args.shape.N;
  const Tensor sums = p[0].new_empty({affine ? slices(args.shape) : 0, 3, H, N});
  if (affine) args.sums = sums.data_ptr<float>();
  launch(kernel_of("head_gate_gradient", x[0]), args, device, stream);
  if (affine) found.push_back(sums.sum(0));
  return found;
}

}  // namespace gpu
