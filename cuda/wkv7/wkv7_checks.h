// Checks of the arguments of the WKV7 operators, for wkv7.cpp and wkv7_gpu.cpp.
#pragma once
#include "common/operations.h"
#include "wkv7/wkv7_cpu.h"

namespace wkv7_checks {

inline void check(const Tensor& x, const char* name, const Tensor& like, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == dtype && x.device() == like.device() && x.is_contiguous(),
              "wkv7: ", name, " must be a contiguous ", dtype, " tensor of sizes ", sizes, " on ", like.device(),
              "; got ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

inline void check_inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
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

inline const float* floats(const Tensor* x) { return x ? x->data_ptr<float>() : nullptr; }
// A bool tensor may hold any nonzero byte for true.
inline const uint8_t* flags(const Tensor* x) { return x ? static_cast<const uint8_t*>(x->data_ptr()) : nullptr; }

inline int64_t chunks(int64_t T) { return (T + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL; }

inline void check_gradient_inputs(const Tensor& r, const Tensor& saved, const Tensor& gy, const Tensor* gstate) {
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  check(saved, "saved", r, at::kFloat, {B, H, chunks(r.size(1)), N, N});
  check(gy, "gy", r, r.scalar_type(), r.sizes());
  if (gstate) check(*gstate, "gstate", r, at::kFloat, {B, H, N, N});
}

}  // namespace wkv7_checks
