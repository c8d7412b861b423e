// Host code of WKV7, for all kernels: checks of tensors.
#pragma once
#include "common/heads.h"
#include "wkv7/wkv7_args.h"
#include "wkv7/wkv7_cpu.h"

namespace wkv7 {

using arguments::check;

inline void check_inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                         const Tensor& b, const Tensor* state, const Tensor* initial, const Tensor* reset) {
  heads::check_common("wkv7", r, WKV7_MAX_N, state, initial, reset);
  check("wkv7", w, "w", r, at::kFloat, r.sizes());
  check("wkv7", k, "k", r, r.scalar_type(), r.sizes());
  check("wkv7", v, "v", r, r.scalar_type(), r.sizes());
  check("wkv7", a, "a", r, r.scalar_type(), r.sizes());
  check("wkv7", b, "b", r, r.scalar_type(), r.sizes());
}

inline int64_t chunks(const Tensor& r) { return (r.size(1) + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL; }

}  // namespace wkv7
