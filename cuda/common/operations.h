// The operators behind torch.ops.rwkv (binding.cpp), for CPUs and, with the device and the stream
// to launch on, for GPUs. Implemented in wkv4.cpp, wkv6.cpp, wkv7.cpp, wkv7_chunk.cpp, fused.cpp,
// fused_gpu.cpp, time_mix.cpp, quant.cpp, quant_gpu.cpp, adamw.cpp and adamw_gpu.cpp. None of torch's
// headers that declare every operator are included: they dominate compile time.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/version.h>

#include <cstdint>
#include <tuple>
#include <vector>

#if TORCH_VERSION_MAJOR >= 2  // torch 2 uses std::optional, torch 1 its own
template <class T> using Optional = std::optional<T>;
#else
template <class T> using Optional = c10::optional<T>;
#endif

inline const at::Tensor* or_null(const Optional<at::Tensor>& x) {
  return x.has_value() && x->defined() ? &*x : nullptr;
}

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;  // y, state, saved
// Of w, u, k, v, state and initial; the last is undefined without `initial`.
using Wkv4GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// Of r, w, k, v, u, state and initial; the last is undefined without `initial`.
using Wkv6GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// Of r, w, k, v, a, b, state and initial; the last is undefined without `initial`.
using Wkv7GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace cpu {

Outputs wkv4_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Optional<Tensor>& state,
                     const Optional<Tensor>& initial, const Optional<Tensor>& reset);
Wkv4GradientTensors wkv4_backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                  const Optional<Tensor>& initial, const Optional<Tensor>& reset, const Tensor& saved,
                                  const Tensor& gy, const Optional<Tensor>& gstate);
Outputs wkv6_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                     const Optional<Tensor>& state, const Optional<Tensor>& initial, const Optional<Tensor>& reset);
Wkv6GradientTensors wkv6_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                                  const Optional<Tensor>& initial, const Optional<Tensor>& reset, const Tensor& saved,
                                  const Tensor& gy, const Optional<Tensor>& gstate);
Outputs wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                     const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                     const Optional<Tensor>& reset);
Wkv7GradientTensors wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                                  const Tensor& b, const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                  const Tensor& saved, const Tensor& gy, const Optional<Tensor>& gstate);
std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps,
                                        at::ScalarType y_dtype);
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                 const Tensor& stats, bool affine);
std::vector<Tensor> mix_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial,
                                const Optional<Tensor>& reset, const Tensor& mix);
std::tuple<Tensor, Tensor, Tensor> mix_backward(at::TensorList gy, const Tensor& x, const Tensor& last,
                                                const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                                const Tensor& mix, bool want_mix);
Tensor gate_forward(const Tensor& r, const Tensor& v);
std::tuple<Tensor, Tensor> gate_backward(const Tensor& g, const Tensor& r, const Tensor& v);
Tensor relu2_forward(const Tensor& k);
Tensor relu2_backward(const Tensor& g, const Tensor& k);
Tensor dropout(const Tensor& x, const Tensor& seed, double p);
void dropout_add(const Tensor& y, const Tensor& x, const Tensor& seed, double p);
Tensor loss(const Tensor& logits, const Tensor& target, double l2wrap, bool gradient);
void adam(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, double step, double rate, double beta1,
          double beta2, double eps, double decay, bool decoupled, double clip,
          const Optional<Tensor>& copy);  // CPU only

Tensor nf4_dense(const Tensor& packed, const Tensor& levels, const Tensor& absmax, const Tensor& absmax_levels,
                 const Tensor& group_absmax, const Tensor& offset, at::IntArrayRef sizes, at::ScalarType dtype);
Tensor int8_dense(const Tensor& x, const Tensor& absmax, at::ScalarType dtype);
void adamw(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, const Optional<Tensor>& m_max,
           const Optional<Tensor>& v_max, const Tensor& tables, const Tensor& clip, int64_t step, double rate,
           double beta1, double beta2, double eps, double decay, int64_t key);
Tensor nf4_quantise(const Tensor& x, const Tensor& thresholds, const Tensor& packed);  // CPU only

}  // namespace cpu

namespace gpu {

Outputs wkv4_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Optional<Tensor>& state,
                     const Optional<Tensor>& initial, const Optional<Tensor>& reset, int64_t segment, int64_t device,
                     int64_t stream);
Wkv4GradientTensors wkv4_backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                  const Optional<Tensor>& initial, const Optional<Tensor>& reset, const Tensor& saved,
                                  const Tensor& gy, const Optional<Tensor>& gstate, int64_t segment, int64_t device,
                                  int64_t stream);
Outputs wkv6_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                     const Optional<Tensor>& state, const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                     int64_t segment, int64_t device, int64_t stream);
Wkv6GradientTensors wkv6_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u,
                                  const Optional<Tensor>& initial, const Optional<Tensor>& reset, const Tensor& saved,
                                  const Tensor& gy, const Optional<Tensor>& gstate, int64_t segment, int64_t device,
                                  int64_t stream);
Outputs wkv7_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                     const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                     const Optional<Tensor>& reset, int64_t device, int64_t stream);
Wkv7GradientTensors wkv7_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                                  const Tensor& b, const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                  const Tensor& saved, const Tensor& gy, const Optional<Tensor>& gstate, int64_t device,
                                  int64_t stream);
Outputs wkv7_chunk_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                           const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                           const Optional<Tensor>& reset, int64_t slice, int64_t device,
                           int64_t stream);
Wkv7GradientTensors wkv7_chunk_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                        const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                        const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                        const Optional<Tensor>& gstate, int64_t slice, int64_t device,
                                        int64_t stream);
std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps,
                                        at::ScalarType y_dtype, int64_t device, int64_t stream);
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& gy, const Tensor& x, const Tensor& w,
                                                 const Tensor& stats, bool affine, int64_t device, int64_t stream);
std::vector<Tensor> mix_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial,
                                const Optional<Tensor>& reset, const Tensor& mix, int64_t device, int64_t stream);
std::vector<Tensor> mix_dropout_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& initial,
                                        const Optional<Tensor>& reset, const Tensor& mix, at::TensorList seeds,
                                        at::ArrayRef<double> p, bool want_y, int64_t device, int64_t stream);
std::tuple<Tensor, Tensor, Tensor> mix_backward(at::TensorList gy, const Tensor& x, const Tensor& last,
                                                const Optional<Tensor>& initial, const Optional<Tensor>& reset,
                                                const Tensor& mix, bool want_mix, int64_t device, int64_t stream);
std::vector<Tensor> shift_forward(const Tensor& x, const Tensor& last, const Optional<Tensor>& reset, const Tensor& mix,
                                  const Tensor& parts, at::TensorList seeds, at::ArrayRef<double> p, bool want_y,
                                  int64_t device, int64_t stream);
// Returns the gradients of x, last, parts, and with `want_mix` that of mix.
std::tuple<Tensor, Tensor, Tensor, Tensor> shift_backward(at::TensorList gy, const Tensor& x, const Tensor& last,
                                                          const Optional<Tensor>& reset, const Tensor& mix,
                                                          const Tensor& parts, bool want_mix, int64_t device,
                                                          int64_t stream);
Tensor gate_forward(const Tensor& r, const Tensor& v, int64_t device, int64_t stream);
std::tuple<Tensor, Tensor> gate_backward(const Tensor& g, const Tensor& r, const Tensor& v, int64_t device,
                                         int64_t stream);
Tensor relu2_forward(const Tensor& k, int64_t device, int64_t stream);
Tensor relu2_backward(const Tensor& g, const Tensor& k, int64_t device, int64_t stream);
Tensor dropout(const Tensor& x, const Tensor& seed, double p, int64_t device, int64_t stream);
void dropout_add(const Tensor& y, const Tensor& x, const Tensor& seed, double p, int64_t device, int64_t stream);
Tensor loss(const Tensor& logits, const Tensor& target, double l2wrap, bool gradient, int64_t device, int64_t stream);
// x: k, v, w, a, mix, v_first; p: w0, a0, k_k, k_a, v0 (in block 0 without mix, v_first, v0). Returns w, k, v, a, b.
std::vector<Tensor> keys_forward(at::TensorList x, at::TensorList p, int64_t device, int64_t stream);
// g: of w, k, v, a, b, and further summands of k and v. Returns the gradients of x, and with `affine` those of w0, a0,
// v0, k_k, k_a [5, H, N].
std::vector<Tensor> keys_backward(at::TensorList g, at::TensorList x, at::TensorList p, bool affine, int64_t device,
                                  int64_t stream);
// x: y, g; p: weight, bias; RWKV-7: also r, k, v, and r_k.
Tensor head_gate_forward(at::TensorList x, at::TensorList p, double eps, int64_t device, int64_t stream);
// Returns the gradients of x, and with `affine` those of weight, bias, r_k [3, H, N].
std::vector<Tensor> head_gate_backward(const Tensor& g, at::TensorList x, at::TensorList p, double eps, bool affine,
                                       int64_t device, int64_t stream);

Tensor nf4_dense(const Tensor& packed, const Tensor& levels, const Tensor& absmax, const Tensor& absmax_levels,
                 const Tensor& group_absmax, const Tensor& offset, at::IntArrayRef sizes, at::ScalarType dtype,
                 int64_t device, int64_t stream);
Tensor int8_dense(const Tensor& x, const Tensor& absmax, at::ScalarType dtype, int64_t device, int64_t stream);
void adamw(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, const Optional<Tensor>& m_max,
           const Optional<Tensor>& v_max, const Tensor& tables, const Tensor& clip, int64_t step, double rate,
           double beta1, double beta2, double eps, double decay, int64_t key, int64_t device, int64_t stream);

}  // namespace gpu
