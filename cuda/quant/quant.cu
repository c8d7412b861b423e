// CUDA kernels that dequantise a frozen matrix; quant.cpp has the CPU loops. A thread writes
// QUANT_WIDTH neighbouring elements, 16 bytes per access; the last one may write fewer. The tables
// are in global memory: the 16 levels of NF4 are in one or two cache lines.
#include "common/device.h"
#include "elementwise/vectors.h"
#include "quant/quant_args.h"

namespace quant {

#include "quant/quant.h"

template <class E> WKV_FN void put(void* y, long long at, long long N, const fused::Vec8& x) {
  if (at + QUANT_WIDTH <= N) return fused::store_vec8((E*)y + at, x);
  for (int i = 0; at + i < N; i++) store((E*)y + at + i, x.x[i]);
}

template <class E> WKV_FN void nf4(const QuantNF4& q) {
  const long long at = thread_index() * QUANT_WIDTH;
  if (at >= q.N) return;
  const float scale = quant_nf4_scale(q, at / QUANT_BLOCK);
  fused::Vec8 x = {};
#pragma unroll
  for (int i = 0; i < QUANT_WIDTH; i += 2) {
    if (at + i >= q.N) break;
    const unsigned pair = q.packed[(at + i) / 2];
    x.x[i] = multiply(q.levels[pair >> 4], scale);
    x.x[i + 1] = multiply(q.levels[pair & 15], scale);
  }
  put<E>(q.y, at, q.N, x);
}

template <class E> WKV_FN void int8(const QuantInt8& q) {
  const long long at = thread_index() * QUANT_WIDTH;
  if (at >= q.N) return;
  long long row = at / q.columns, column = at - row * q.columns;
  fused::Vec8 x = {};
#pragma unroll
  for (int i = 0; i < QUANT_WIDTH; i++) {
    if (at + i >= q.N) break;
    x.x[i] = quant_int8(q.q[at + i], q.absmax[row]);
    if (++column == q.columns) column = 0, row++;
  }
  put<E>(q.y, at, q.N, x);
}

#define OF(E)                                                              \
  KERNEL(QUANT_THREADS) quant_nf4_##E(const QuantNF4 q) { nf4<E>(q); }     \
  KERNEL(QUANT_THREADS) quant_int8_##E(const QuantInt8 q) { int8<E>(q); }
OF(fp32)
OF(bf16)
OF(fp16)
#undef OF

}  // namespace quant
