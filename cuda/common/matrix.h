// Matrix products by a warp on tensor cores (sm_80 and later), with almost fp32 accuracy.
//
// A tensor core multiplies tf32 numbers, fp32 with 10 bits of mantissa. A number is split into two of
// them, x = high + low, and x y is computed as high high + high low + low high: the relative error
// of a product is below 2^-21.
//
// A warp computes D [16, 8] += A [16, 8] B [8, 8]. Thread i of the warp has, with g = i / 4 and
// t = i % 4:
//     A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]      B[t][g], B[t + 4][g]
//     D[g][2 t], D[g][2 t + 1], D[g + 8][2 t], D[g + 8][2 t + 1]
#pragma once
#include "common/device.h"

struct Split { unsigned high, low; };

WKV_FN Split split(float x) {
  const unsigned high = as_bits(x) & 0xffffe000u;
  return {high, as_bits(x - as_float(high))};
}

#ifdef __CUDACC_RTC__
#if __CUDA_ARCH__ >= 800
#define MATRIX_UNITS 1
WKV_FN void multiply_tf32(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
WKV_FN void multiply_add(float (&d)[4], const Split (&a)[4], const Split (&b)[2]) {
  multiply_tf32(d, a[0].low, a[1].low, a[2].low, a[3].low, b[0].high, b[1].high);
  multiply_tf32(d, a[0].high, a[1].high, a[2].high, a[3].high, b[0].low, b[1].low);
  multiply_tf32(d, a[0].high, a[1].high, a[2].high, a[3].high, b[0].high, b[1].high);
}
#endif
#endif
