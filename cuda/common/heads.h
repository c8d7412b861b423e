// Host code of the operators with a matrix-valued state by head (WKV6, WKV7): checks of arguments,
// the parallel loop over heads, and tensors for and of the CUDA kernels.
#pragma once
#include <ATen/Parallel.h>

#include <vector>

#include "common/arguments.h"

namespace heads {

using arguments::check;

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

// Checks what the backward pass gets besides the inputs.
inline void check_gradients(const char* op, const Tensor& r, int64_t chunks, const Tensor& saved, const Tensor& gy,
                            const Tensor* gstate) {
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  check(op, saved, "saved", r, at::kFloat, {B, H, chunks, N, N});
  check(op, gy, "gy", r, r.scalar_type(), r.sizes());
  if (gstate) check(op, *gstate, "gstate", r, at::kFloat, {B, H, N, N});
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

// ---- CUDA ----

// The kernels read four elements at once. A tensor may start in the middle of such a vector.
inline Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % (4 * x.element_size()) ? x.clone() : x;
}
inline Optional<Tensor> aligned(const Optional<Tensor>& x) {
  return or_null(x) ? Optional<Tensor>(aligned(*x)) : x;
}

// [blocks, ...], parts of a sum by the blocks that share a head.
inline Tensor sum_blocks(const Tensor& x) { return x.size(0) == 1 ? x.select(0, 0) : x.sum(0); }

}  // namespace heads
