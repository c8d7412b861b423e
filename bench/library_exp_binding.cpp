// Runs the loops of library_exp.cpp as cuda/wkv4/wkv4.cpp runs its own: parallel over channels, row
// by row. fp32.
#include <torch/extension.h>

#include <ATen/Parallel.h>

#include "wkv4/wkv4_cpu.h"

extern const Wkv4Loops wkv4_loops_library;

namespace {

Wkv4Problem problem(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& saved) {
  return {k.size(1), k.size(2), w.data_ptr<float>(), u.data_ptr<float>(), k.data_ptr(), v.data_ptr(),
          nullptr, nullptr, nullptr, saved.data_ptr<float>()};
}

template <class F>
void parallel_channels(int64_t rows, int64_t C, const F& work) {
  const int64_t block = wkv4_loops_library.block;
  for (int64_t row = 0; row < rows; row++)
    at::parallel_for(0, (C + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      work(row, begin * block, std::min(C, end * block) - begin * block);
    });
}

}  // namespace

void forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
             const at::Tensor& saved, const at::Tensor& y) {
  const Wkv4Problem q = problem(w, u, k, v, saved);
  const Wkv4Outputs out{y.data_ptr()};
  parallel_channels(k.size(0), q.C,
                    [&](int64_t row, int64_t c, int64_t n) { wkv4_loops_library.forward[0](q, out, row, c, n); });
}

// gw, gu: [B, C]; gfirst: [B, 3, C].
void backward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
              const at::Tensor& saved, const at::Tensor& gy, const at::Tensor& gw, const at::Tensor& gu,
              const at::Tensor& gk, const at::Tensor& gv, const at::Tensor& gfirst) {
  const Wkv4Problem q = problem(w, u, k, v, saved);
  const Wkv4Gradients grad{gy.data_ptr(), nullptr, gw.data_ptr<float>(), gu.data_ptr<float>(),
                           gk.data_ptr(), gv.data_ptr(), gfirst.data_ptr<float>()};
  parallel_channels(k.size(0), q.C,
                    [&](int64_t row, int64_t c, int64_t n) { wkv4_loops_library.backward[0](q, grad, row, c, n); });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("forward", &forward);
  module.def("backward", &backward);
}
