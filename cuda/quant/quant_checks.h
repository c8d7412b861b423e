// Checks the arguments of the operators that dequantise a matrix, and fills the kernels' arguments;
// for all devices.
#pragma once
#include "common/arguments.h"
#include "quant/quant_args.h"

namespace quant {

using arguments::check_count;

inline QuantNF4 nf4_of(const Tensor& packed, const Tensor& levels, const Tensor& absmax, const Tensor& absmax_levels,
                       const Tensor& group_absmax, const Tensor& offset, const Tensor& y) {
  const int64_t N = y.numel(), blocks = (N + QUANT_BLOCK - 1) / QUANT_BLOCK;
  check_count(packed, "packed", packed, at::kByte, (N + 1) / 2);
  check_count(levels, "levels", packed, at::kFloat, 16);
  check_count(absmax, "absmax", packed, at::kByte, blocks);
  check_count(absmax_levels, "absmax_levels", packed, at::kFloat, 256);
  check_count(group_absmax, "group_absmax", packed, at::kFloat, (blocks + QUANT_GROUP - 1) / QUANT_GROUP);
  check_count(offset, "offset", packed, at::kFloat, 1);
  return {N, packed.data_ptr<uint8_t>(), levels.data_ptr<float>(), absmax.data_ptr<uint8_t>(),
          absmax_levels.data_ptr<float>(), group_absmax.data_ptr<float>(), offset.data_ptr<float>(), y.data_ptr()};
}

inline QuantInt8 int8_of(const Tensor& q, const Tensor& absmax, const Tensor& y) {
  TORCH_CHECK(q.dim() == 2, "q must be [rows, columns]; got ", q.sizes());
  check_count(q, "q", q, at::kChar, q.numel());
  check_count(absmax, "absmax", q, at::kFloat, q.size(0));
  return {q.numel(), q.size(1), q.data_ptr<int8_t>(), absmax.data_ptr<float>(), y.data_ptr()};
}

}  // namespace quant
