// torch.ops.rwkv.cuda_adamw: as adamw.cpp, with the device and the stream to launch on. Only the
// tensors' pointers are used, so tests can run the kernels on a CPU.
#include <algorithm>
#include <string>

#include "common/launcher.h"
#include "optimizer/adamw_checks.h"

namespace gpu {

constexpr int64_t TARGET_WARPS = 1 << 13;  // enough to fill a GPU; with more, each takes more blocks

void adamw(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v, const Optional<Tensor>& m_max,
           const Optional<Tensor>& v_max, const Tensor& tables, const Tensor& clip, int64_t step, double rate,
           double beta1, double beta2, double eps, double decay, int64_t key, int64_t device, int64_t stream) {
  AdamW q = optimizer::adamw_of(p, g, m, v, m_max, v_max, tables, clip, step, rate, beta1, beta2, eps, decay, key);
  if (!q.N) return;
  const void* const pointers[] = {q.p, q.g, q.m, q.v};
  q.vectorized = std::all_of(std::begin(pointers), std::end(pointers),
                             [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; });
  const int64_t blocks = (q.N + ADAMW_BLOCK - 1) / ADAMW_BLOCK;
  q.runs = q.m_max ? int(std::max<int64_t>(1, blocks / TARGET_WARPS)) : 1;
  const int64_t per_launch_block = int64_t(ADAMW_WARPS) * q.runs;
  const std::string kernel = std::string("adamw_") + (q.m_max ? "8bit" : "full") +
                             (p.scalar_type() == at::kFloat ? "_fp32" : "_bf16");
  launcher::launch(device, reinterpret_cast<void*>(stream), kernel, (blocks + per_launch_block - 1) / per_launch_block,
                   ADAMW_THREADS, &q);
}

}  // namespace gpu
