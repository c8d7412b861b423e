// torch.ops.rwkv.cuda_nf4_dense and cuda_int8_dense: as quant.cpp, with the device and the stream to
// launch on. Only the tensors' pointers are used, so tests can run the kernels on a CPU.
#include <string>

#include "common/launcher.h"
#include "quant/quant_checks.h"

namespace gpu {
namespace {

std::string kernel_name(const char* kind, at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "the CUDA kernels return fp32, bf16 or fp16; got ", dtype);
  return std::string("quant_") + kind + (dtype == at::kFloat ? "_fp32" : dtype == at::kHalf ? "_fp16" : "_bf16");
}

template <class Args> void launch(const std::string& kernel, const Args& q, int64_t device, int64_t stream) {
  constexpr int64_t PER_BLOCK = QUANT_THREADS * QUANT_WIDTH;
  TORCH_CHECK(reinterpret_cast<uintptr_t>(q.y) % 16 == 0, "the output must begin at a multiple of 16 bytes");
  if (q.N)
    launcher::launch(device, reinterpret_cast<void*>(stream), kernel, (q.N + PER_BLOCK - 1) / PER_BLOCK, QUANT_THREADS,
                     &q);
}

}  // namespace

Tensor nf4_dense(const Tensor& packed, const Tensor& levels, const Tensor& absmax, const Tensor& absmax_levels,
                 const Tensor& group_absmax, const Tensor& offset, at::IntArrayRef sizes, at::ScalarType dtype,
                 int64_t device, int64_t stream) {
  const std::string kernel = kernel_name("nf4", dtype);
  const Tensor y = packed.new_empty(sizes, packed.options().dtype(dtype));
  launch(kernel, quant::nf4_of(packed, levels, absmax, absmax_levels, group_absmax, offset, y), device, stream);
  return y;
}

Tensor int8_dense(const Tensor& x, const Tensor& absmax, at::ScalarType dtype, int64_t device, int64_t stream) {
  const std::string kernel = kernel_name("int8", dtype);
  const Tensor y = x.new_empty(x.sizes(), x.options().dtype(dtype));
  launch(kernel, quant::int8_of(x, absmax, y), device, stream);
  return y;
}

}  // namespace gpu
