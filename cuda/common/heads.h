// Host code for operators with a matrix-valued state by head (WKV6): checks of arguments, and the
// parallel loop over heads.
#pragma once
#include <ATen/Parallel.h>

#include <vector>

#include "common/operations.h"

namespace heads {

inline void check(const char* op, const Tensor& x, const char* name, const Tensor& like, at::ScalarType dtype,
                  at::IntArrayRef sizes) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == dtype && x.device() == like.device() && x.is_contiguous(), op,
              ": ", name, " must be a contiguous ", dtype, " tensor of sizes ", sizes, " on ", like.device(), "; got ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

// Checks r [B, T, H, N], and the states and resets, which may be null.
inline void check_common(const char* op, const Tensor& r, int max_N, const Tensor* state, const Tensor* initial,
                         const Tensor* reset) {
  TORCH_CHECK(r.dim() == 4 && r.size(1) >= 1, op, ": r must be [B, T, H, N] with T at least 1; got ", r.sizes());
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  TORCH_CHECK(N % 16 == 0 && N <= max_N, op, ": the head size must be a multiple of 16, at most ", max_N, "; got ", N);
  check(op, r, "r", r, r.scalar_type(), r.sizes());
  if (state) check(op, *state, "state", r, at::kFloat, {B, H, N, N});
  if (initial) check(op, *initial, "initial", r, at::kFloat, {B, H, N, N});
  if (reset) check(op, *reset, "reset", r, at::kBool, {B, T});
}

inline const float* floats(const Tensor* x) { return x ? x->data_ptr<float>() : nullptr; }
// A bool tensor may hold any nonzero byte for true.
inline const uint8_t* flags(const Tensor* x) { return x ? static_cast<const uint8_t*>(x->data_ptr()) : nullptr; }

// The index of the loops for r's dtype: 0 for fp32, 1 for bf16.
inline int cpu_dtype(const char* op, const Tensor& r) {
  TORCH_CHECK(r.is_cpu() && (r.scalar_type() == at::kFloat || r.scalar_type() == at::kBFloat16), op,
              "'s CPU kernels take fp32 or bf16 on a CPU; r is ", r.scalar_type(), " on ", r.device());
  return r.scalar_type() == at::kBFloat16;
}

// Calls work(row, head, scratch) for each head of each batch row, in parallel.
template <class F>
void each(const Tensor& r, int64_t scratch, const F& work) {
  const int64_t H = r.size(2);
  at::parallel_for(0, r.size(0) * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(scratch);
    for (int64_t i = begin; i < end; i++) work(i / H, i % H, memory.data());
  });
}

}  // namespace heads
