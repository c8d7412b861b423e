// torch.ops.rwkv.nf4_dense and int8_dense on a CPU, in fp32 and bf16, and nf4_quantise.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "quant/quant_checks.h"

#define WKV_FN static inline

namespace cpu {
namespace {

// Through memory, so that the compiler cannot fuse it with an addition.
inline float multiply(float x, float y) {
  volatile float product = x * y;
  return product;
}

#include "quant/quant.h"

constexpr int64_t GRAIN = 1 << 14;  // elements per task
constexpr float QUANT_TINY = 0x1p-126f;  // instead of an absmax of 0, as in rwkv/kernels/quant.py

struct Bf16 { uint16_t bits; };
void store(float* to, float x) { *to = x; }
void store(Bf16* to, float x) {  // rounds to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u;
}

Tensor output(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK(like.is_cpu() && (dtype == at::kFloat || dtype == at::kBFloat16),
              "the CPU kernels return fp32 or bf16 on a CPU; got ", dtype, " on ", like.device());
  return like.new_empty(sizes, like.options().dtype(dtype));
}

template <class E> void nf4(const QuantNF4& q, int64_t begin, int64_t end) {  // blocks
  for (int64_t block = begin; block < end; block++) {
    const float scale = quant_nf4_scale(q, block);
    E values[16];
    for (int i = 0; i < 16; i++) store(&values[i], q.levels[i] * scale);
    const int64_t first = block * QUANT_BLOCK, count = std::min<int64_t>(QUANT_BLOCK, q.N - first);
    const uint8_t* packed = q.packed + first / 2;
    E* y = static_cast<E*>(q.y) + first;
    for (int64_t i = 0; i + 1 < count; i += 2) {
      const uint8_t pair = packed[i / 2];
      y[i] = values[pair >> 4], y[i + 1] = values[pair & 15];
    }
    if (count % 2) y[count - 1] = values[packed[count / 2] >> 4];
  }
}

template <class E> void int8(const QuantInt8& q, int64_t begin, int64_t end) {  // rows
  for (int64_t row = begin; row < end; row++) {
    E values[256];
    for (int i = 0; i < 256; i++) store(&values[i], quant_int8(int8_t(i), q.absmax[row]));
    const int64_t first = row * q.columns;
    E* y = static_cast<E*>(q.y) + first;
    for (int64_t i = 0; i < q.columns; i++) y[i] = values[uint8_t(q.q[first + i])];
  }
}

// One block: the loops over its elements are inside those over the thresholds, so that the compiler
// vectorises them.
float quantise_nf4(const float* x, const float* thresholds, uint8_t* packed, int count) {
  float absmax = 0, scaled[QUANT_BLOCK] = {};
  int32_t level[QUANT_BLOCK] = {};
  for (int i = 0; i < count; i++) absmax = std::max(absmax, std::abs(x[i]));
  const float inverse = 1.0f / std::max(absmax, QUANT_TINY);
  for (int i = 0; i < count; i++) scaled[i] = x[i] * inverse;
  for (int k = 0; k < 15; k++) {
    const float threshold = thresholds[k];
    for (int i = 0; i < QUANT_BLOCK; i++) level[i] += scaled[i] > threshold;
  }
  if (count % 2) level[count] = 0;  // the unused half of the last byte
  for (int i = 0; i < count; i += 2) packed[i / 2] = uint8_t(level[i] << 4 | level[i + 1]);
  return absmax;
}

template <class Args> void run(const Tensor& y, void (*in_fp32)(const Args&, int64_t, int64_t),
                               void (*in_bf16)(const Args&, int64_t, int64_t), const Args& q, int64_t count,
                               int64_t elements) {
  const auto work = y.scalar_type() == at::kFloat ? in_fp32 : in_bf16;
  at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements)),
                   [&](int64_t begin, int64_t end) { work(q, begin, end); });
}

}  // namespace

Tensor nf4_dense(const Tensor& packed, const Tensor& levels, const Tensor& absmax, const Tensor& absmax_levels,
                 const Tensor& group_absmax, const Tensor& offset, at::IntArrayRef sizes, at::ScalarType dtype) {
  const Tensor y = output(packed, sizes, dtype);
  const QuantNF4 q = quant::nf4_of(packed, levels, absmax, absmax_levels, group_absmax, offset, y);
  run(y, nf4<float>, nf4<Bf16>, q, absmax.numel(), QUANT_BLOCK);
  return y;
}

Tensor nf4_quantise(const Tensor& x, const Tensor& thresholds, const Tensor& packed) {
  const int64_t N = x.numel(), blocks = (N + QUANT_BLOCK - 1) / QUANT_BLOCK;
  arguments::check_count(x, "x", packed, at::kFloat, N);
  arguments::check_count(thresholds, "thresholds", packed, at::kFloat, 15);
  arguments::check_count(packed, "packed", packed, at::kByte, (N + 1) / 2);
  const Tensor absmax = x.new_empty({blocks});
  const float *from = x.data_ptr<float>(), *bounds = thresholds.data_ptr<float>();
  uint8_t* to = packed.data_ptr<uint8_t>();
  float* of_block = absmax.data_ptr<float>();
  at::parallel_for(0, blocks, GRAIN / QUANT_BLOCK, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * QUANT_BLOCK;
      const int count = int(std::min<int64_t>(QUANT_BLOCK, N - first));
      of_block[block] = quantise_nf4(from + first, bounds, to + first / 2, count);
    }
  });
  return absmax;
}

Tensor int8_dense(const Tensor& x, const Tensor& absmax, at::ScalarType dtype) {
  const Tensor y = output(x, x.sizes(), dtype);
  const QuantInt8 q = quant::int8_of(x, absmax, y);
  run(y, int8<float>, int8<Bf16>, q, absmax.numel(), q.columns);
  return y;
}

}  // namespace cpu
