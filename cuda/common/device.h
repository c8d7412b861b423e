// Types, arithmetic and thread indices for the CUDA kernels. Includes no CUDA header. Tests that
// run the kernels on a CPU provide the first half themselves (tests/wkv/fake_driver.cpp).
#pragma once

#ifdef __CUDACC_RTC__
#define WKV_FN static __device__ __forceinline__
#define KERNEL(...) \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__)  // max threads per block, min blocks per SM
#define WKV_MEMBER __device__ __forceinline__
#define SHARED __shared__
typedef float wkv_float;
typedef unsigned wkv_bits;
// The relative error is 2^-22 + |x| 2^-23. (WKV4 has |x| <= 30, or adds e^x to e^0 = 1, next to which it is negligible.)
// Without code for denormal numbers: a result below 2^-126 is 0.
WKV_FN float wkv_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
WKV_FN float precise_exp(float x) { return expf(x); }  // to 1 ulp
WKV_FN float wkv_max(float x, float y) { return fmaxf(x, y); }
WKV_FN float wkv_negative_magnitude(float x) { return -fabsf(x); }
// For normal y; 0 if |y| > 2^126.
WKV_FN float wkv_divide(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return x * inverse;
}
WKV_FN float square_root(float x) { return sqrtf(x); }
WKV_FN float as_float(unsigned x) { return __uint_as_float(x); }
WKV_FN unsigned as_bits(float x) { return __float_as_uint(x); }
WKV_FN float fp16_to_float(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
WKV_FN unsigned short float_to_fp16(float x) {
  unsigned short y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
WKV_FN float multiply(float x, float y) { return __fmul_rn(x, y); }  // never fused into an FMA
WKV_FN unsigned block_number() { return blockIdx.x; }
WKV_FN unsigned thread_number() { return threadIdx.x; }
WKV_FN unsigned block_size() { return blockDim.x; }
WKV_FN long long thread_index() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
WKV_FN void barrier() { __syncthreads(); }
WKV_FN void warp_barrier() { __syncwarp(); }
template <class V> WKV_FN V shuffle_xor(V x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
#if __CUDA_ARCH__ >= 800
WKV_FN unsigned short float_to_bf16(float x) {
  unsigned short y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// Two numbers in one instruction, the first in the low half.
WKV_FN unsigned float_to_two_bf16(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
WKV_FN unsigned float_to_two_fp16(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
#define TENSOR_CORES
// d += a b for matrices a [16, 8], b [8, 8] and d [16, 8] spread over a warp, in TF32: the low 13 bits of a's and b's
// elements do not count. With g = lane / 4 and t = lane % 4, a thread has a[g][t], a[g + 8][t], a[g][t + 4],
// a[g + 8][t + 4]; b[t][g], b[t + 4][g]; d[g][2t], d[g][2t + 1], d[g + 8][2t], d[g + 8][2t + 1].
WKV_FN void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
WKV_FN unsigned short float_to_bf16(float x) {  // round to nearest even
  const unsigned bits = __float_as_uint(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
}
WKV_FN unsigned float_to_two_bf16(float low, float high) { return float_to_bf16(low) | (unsigned)float_to_bf16(high) << 16; }
WKV_FN unsigned float_to_two_fp16(float low, float high) { return float_to_fp16(low) | (unsigned)float_to_fp16(high) << 16; }
#endif
#endif

struct fp32 { float x; };
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

WKV_FN float load(const fp32* p) { return p->x; }
WKV_FN float load(const bf16* p) { return as_float((unsigned)p->bits << 16); }
WKV_FN float load(const fp16* p) { return fp16_to_float(p->bits); }
WKV_FN void store(fp32* p, float x) { p->x = x; }
WKV_FN void store(bf16* p, float x) { p->bits = float_to_bf16(x); }
WKV_FN void store(fp16* p, float x) { p->bits = float_to_fp16(x); }
WKV_FN unsigned two(const bf16*, float low, float high) { return float_to_two_bf16(low, high); }
WKV_FN unsigned two(const fp16*, float low, float high) { return float_to_two_fp16(low, high); }
