// tests/gpu/test_matrix_gpu.py: C = A B of [16, 64] and [64, 8] by one warp, and the speed of products.
#include "common/matrix.h"

struct Args {
  const float *a, *b;
  float* c;
  long long repeats;
};

KERNEL(32) product(const Args q) {
  const int g = thread_number() / 4, t = thread_number() % 4;
  float d[4] = {};
  for (int k = 0; k < 64; k += 8) {
    const Split a[4] = {split(q.a[g * 64 + k + t]), split(q.a[(g + 8) * 64 + k + t]), split(q.a[g * 64 + k + t + 4]),
                        split(q.a[(g + 8) * 64 + k + t + 4])};
    const Split b[2] = {split(q.b[(k + t) * 8 + g]), split(q.b[(k + t + 4) * 8 + g])};
    multiply_add(d, a, b);
  }
  q.c[g * 8 + 2 * t] = d[0];
  q.c[g * 8 + 2 * t + 1] = d[1];
  q.c[(g + 8) * 8 + 2 * t] = d[2];
  q.c[(g + 8) * 8 + 2 * t + 1] = d[3];
}

// 8 independent products per warp and repetition; operands in registers.
KERNEL(128) speed(const Args q) {
  float d[8][4] = {};
  Split a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = split(q.a[thread_number() + i]);
  for (int i = 0; i < 2; i++) b[i] = split(q.b[thread_number() + i]);
  for (long long n = 0; n < q.repeats; n++) {
#pragma unroll
    for (int i = 0; i < 8; i++) multiply_add(d[i], a, b);
  }
  float sum = 0;
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 4; j++) sum += d[i][j];
  q.c[thread_index()] = sum;
}
