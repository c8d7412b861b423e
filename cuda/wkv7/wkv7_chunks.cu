// The gradient of WKV7 by matrix products over the 16 tokens between two saved states (the WY form),
// on tensor cores. Heads of 64; w must not be below -2, so that e^(-c) below stays in range.
//
// With c the sum of w over the tokens so far, R = r e^c, A = a e^(c of the token before), K = k e^-c,
// B = b e^-c, D = e^(c of the last token), S the state before the tokens and G the gradient of the one
// after them; M(x, y) = x y^T below the diagonal, M+ with it; rows are tokens:
//
//     AB = M(A, B)   AK = M(A, K)   RK = M+(R, K)   RB = M+(R, B)
//     U = (1 - AB)^-1 (A S^T + AK V)                       S a of every token
//     Z = (1 - AB^T)^-1 (RB^T gY + B D G^T)                gradient of A S^T + AK V
//     gV = RK^T gY + K D G^T + AK^T Z
//     gRK = M+(gY, V)   gRB = M+(gY, U)   gAK = M(Z, V)   gAB = M(Z, U)
//     gR = gY S + gRK K + gRB B          gA = Z S + gAK K + gAB B
//     gK = gRK^T R + gAK^T A + V G D     gB = gRB^T R + gAB^T A + U G D
//     gradient of c: gR R - gK K - gB B, of c before: gA A, and of the last c: that of D
//     G <- G D + gY^T R + Z^T A
//
// Tokens of different documents are different spans: no product mixes them.
#include "wkv7/wkv7_chunk.h"

namespace wkv7_chunks {

// Of a chunk, from its last document to its first, with G of the state after it in memory. `partial`:
// which part of q.ginitial to add to.
template <class E>
WKV_FN void chunk_gradient(const Kernel<E>& kernel, const Wkv7Args& q, long long chunk, long long partial,
                           bool going_on) {
  const unsigned char* starts = starts_of(q, kernel.index);
  const long long begin = chunk * L;
  Span span = chunk_span(q, chunk);
  while (span.end > begin) {
    span.begin = document(starts, begin, span.end);
    const bool fresh = starts && starts[span.begin];
    kernel.gradient(span, fresh ? q.initial : q.saved, fresh ? kernel.index : kernel.index * chunks_of(q) + chunk,
                    going_on || fresh);
    if (fresh) {  // the state before this document is the initial one
      barrier();
      if (q.ginitial) kernel.template write_gradient<true>(q.ginitial, partial);
      kernel.read_state(kernel.m.G, nullptr, 0);
    }
    span.end = span.begin;
  }
}

// A block per head, which goes through time.
template <class E> WKV_FN void gradient(const Wkv7Args& q) {
  SHARED_FLOATS(memory);
  const Kernel<E> kernel = kernel_of<E>(q, memory, block_number());
  if (q.ginitial) {
    kernel.read_state(kernel.m.G, nullptr, 0);
    kernel.template write_gradient<false>(q.ginitial, kernel.index);
  }
  kernel.read_state(kernel.m.G, q.glast, kernel.index);
  for (long long chunk = chunks_of(q) - 1; chunk >= 0; chunk--) chunk_gradient(kernel, q, chunk, kernel.index, true);
  barrier();
  kernel.template write_gradient<false>(q.gfirst, kernel.index);
}
// A block per head and chunk: G after every chunk is known (wkv7_scan.cu).
template <class E> WKV_FN void parallel_gradient(const Wkv7Args& q) {
  SHARED_FLOATS(memory);
  const long long block = block_number(), chunk = block % chunks_of(q);
  const Kernel<E> kernel = kernel_of<E>(q, memory, block / chunks_of(q));
  if (q.ginitial) {
    kernel.read_state(kernel.m.G, nullptr, 0);
    kernel.template write_gradient<false>(q.ginitial, block);
  }
  kernel.read_state(kernel.m.G, q.gstates, block);
  chunk_gradient(kernel, q, chunk, block, false);
}

#ifdef MATRIX_UNITS
#define KERNELS_OF(E)                                                                                     \
  KERNEL(32 * WARPS) wkv7_chunk_gradient_##E(const Wkv7Args q) { gradient<E>(q); }                          \
  KERNEL(32 * WARPS) wkv7_parallel_gradient_##E(const Wkv7Args q) { parallel_gradient<E>(q); }
#else  // never launched
#define KERNELS_OF(E)                                               \
  KERNEL(32 * WARPS) wkv7_chunk_gradient_##E(const Wkv7Args) {}     \
  KERNEL(32 * WARPS) wkv7_parallel_gradient_##E(const Wkv7Args) {}
#endif
KERNELS_OF(fp32)
KERNELS_OF(bf16)
KERNELS_OF(fp16)
#undef KERNELS_OF

}  // namespace wkv7_chunks
