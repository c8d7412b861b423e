// Checks the arguments of an AdamW step, and fills the kernels' arguments; for all devices.
#pragma once
#include <cmath>

#include "common/arguments.h"
#include "optimizer/adamw_args.h"

namespace optimizer {

using arguments::check_count;

inline AdamW adamw_of(const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& v,
                      const Optional<Tensor>& m_max, const Optional<Tensor>& v_max, const Tensor& tables,
                      const Tensor& clip, int64_t step, double rate, double beta1, double beta2, double eps,
                      double decay, int64_t key) {
  const at::ScalarType type = p.scalar_type();
  const int64_t N = p.numel(), blocks = (N + ADAMW_BLOCK - 1) / ADAMW_BLOCK;
  const Tensor *mx = or_null(m_max), *vx = or_null(v_max);
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "the weight must be fp32 or bf16; got ", type);
  TORCH_CHECK(N < 1ll << 32, "at most 2^32 elements are supported; got ", N);
  TORCH_CHECK(step >= 1, "steps count from 1; got ", step);
  TORCH_CHECK(!mx == !vx, "both moments must have an absmax, or none");
  check_count(p, "the weight", p, type, N);
  check_count(g, "the gradient", p, type, N);
  check_count(m, "the first moment", p, mx ? at::kByte : at::kFloat, N);
  check_count(v, "the second moment", p, mx ? at::kByte : at::kFloat, N);
  if (mx) {
    check_count(*mx, "the first moment's absmax", p, at::kFloat, blocks);
    check_count(*vx, "the second moment's absmax", p, at::kFloat, blocks);
  }
  check_count(tables, "tables", p, at::kFloat, 4 * 256);
  check_count(clip, "clip", p, at::kFloat, 1);
  return {N,
          p.data_ptr(),
          g.data_ptr(),
          m.data_ptr(),
          v.data_ptr(),
          mx ? mx->data_ptr<float>() : nullptr,
          vx ? vx->data_ptr<float>() : nullptr,
          tables.data_ptr<float>(),
          clip.data_ptr<float>(),
          float(1 - rate * decay),
          float(1 - beta1),
          float(beta2),
          float(1 - beta2),
          float(rate / (1 - std::pow(beta1, double(step)))),
          float(std::sqrt(1 - std::pow(beta2, double(step)))),
          float(eps),
          unsigned(key),
          0,
          false};
}

}  // namespace optimizer
