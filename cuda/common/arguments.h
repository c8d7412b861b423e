// Host code of the operators: checks of tensors, and pointers to them.
#pragma once
#include "common/operations.h"

namespace arguments {

inline void check(const char* op, const Tensor& x, const char* name, const Tensor& like, at::ScalarType dtype,
                  at::IntArrayRef sizes) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == dtype && x.device() == like.device() && x.is_contiguous(), op,
              ": ", name, " must be a contiguous ", dtype, " tensor of sizes ", sizes, " on ", like.device(), "; got ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

inline void check_count(const Tensor& x, const char* name, const Tensor& like, at::ScalarType dtype, int64_t count) {
  TORCH_CHECK(x.is_contiguous() && x.device() == like.device() && x.scalar_type() == dtype && x.numel() == count, name,
              " must be a contiguous ", dtype, " tensor of ", count, " elements on ", like.device(), "; got ",
              x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

inline const float* floats(const Tensor* x) { return x ? x->data_ptr<float>() : nullptr; }
// A bool tensor may hold any nonzero byte for true.
inline const uint8_t* flags(const Tensor* x) { return x ? static_cast<const uint8_t*>(x->data_ptr()) : nullptr; }

// The index of the loops for x's dtype: 0 for fp32, 1 for bf16.
inline int cpu_dtype(const char* op, const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16), op,
              "'s CPU kernels take fp32 or bf16 on a CPU; ", name, " is ", x.scalar_type(), " on ", x.device());
  return x.scalar_type() == at::kBFloat16;
}

}  // namespace arguments
