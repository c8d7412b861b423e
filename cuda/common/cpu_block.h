// Vectors of WKV_BYTES bytes for the CPU loops: arithmetic, e^x, and blocks of neighbouring
// channels loaded from and stored to fp32 or bf16. Each including file sets the target and
// WKV_BYTES first.
#pragma once
#include <stdint.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define WKV_FN static inline __attribute__((always_inline))

typedef float wkv_float __attribute__((vector_size(WKV_BYTES)));
typedef int32_t wkv_int __attribute__((vector_size(WKV_BYTES)));
typedef uint32_t wkv_bits __attribute__((vector_size(WKV_BYTES)));
typedef int16_t wkv_shorts __attribute__((vector_size(WKV_BYTES)));

// Like x > y ? x : y, so y if one is NaN. GCC does not always compile that to one instruction.
#ifdef __x86_64__
#define WKV_PAIR(operation) (wkv_float) WKV_INTRINSIC(operation)((WKV_INTRINSIC_TYPE)x, (WKV_INTRINSIC_TYPE)y)
#if WKV_BYTES == 64
#define WKV_INTRINSIC(operation) _mm512_##operation##_ps
#define WKV_INTRINSIC_TYPE __m512
#elif WKV_BYTES == 32
#define WKV_INTRINSIC(operation) _mm256_##operation##_ps
#define WKV_INTRINSIC_TYPE __m256
#else
#define WKV_INTRINSIC(operation) _mm_##operation##_ps
#define WKV_INTRINSIC_TYPE __m128
#endif
WKV_FN wkv_float wkv_max(wkv_float x, wkv_float y) { return WKV_PAIR(max); }
WKV_FN wkv_float wkv_min(wkv_float x, wkv_float y) { return WKV_PAIR(min); }
#else
WKV_FN wkv_float wkv_max(wkv_float x, wkv_float y) { return x > y ? x : y; }
WKV_FN wkv_float wkv_min(wkv_float x, wkv_float y) { return x < y ? x : y; }
#endif
// The maximum as unsigned integers: for floats with the sign bit cleared it is the larger one, and
// NaN is the largest of all.
WKV_FN wkv_bits wkv_max_bits(wkv_bits x, wkv_bits y) { return x > y ? x : y; }
WKV_FN wkv_float wkv_divide(wkv_float x, wkv_float y) { return x / y; }
WKV_FN wkv_float wkv_negative_magnitude(wkv_float x) { return (wkv_float)((wkv_bits)x | 0x80000000u); }

// e^x for -87 <= x <= 87, to 1.5 ulp: x = n·ln2 + r with |r| <= ln2/2, a polynomial for e^r, and n
// added to the exponent bits.
WKV_FN wkv_float wkv_exp_in_range(wkv_float x) {
  const wkv_float rounded = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold n
  const wkv_float r = x - (rounded - 12582912.0f) * 0.693147181f;
  wkv_float y = r * 0.00829022937f + 0.0418983884f;
  y = y * r + 0.166676402f;
  y = y * r + 0.499991447f;
  y = y * r + 0.999999702f;
  y = y * r + 1.0f;
  return (wkv_float)((wkv_bits)y + ((wkv_bits)rounded << 23));
}

// e^x for x <= 87; 0 below -87, where the normal fp32 numbers end. NaN stays NaN if its low 9 bits
// are 0 (see canonical_nan).
WKV_FN wkv_float wkv_exp(wkv_float x) {
  const wkv_float least = wkv_float{} - 87.0f, power = wkv_exp_in_range(wkv_max(least, x));
  return least > x ? wkv_float{} : power;
}

WKV_FN bool all(wkv_int x) {  // lanes of a comparison
  int32_t found = -1;
  for (int i = 0; i < WKV_BYTES / 4; i++) found &= x[i];
  return found;
}

namespace {

struct bf16 { uint16_t bits; };
constexpr int LANES = WKV_BYTES / 4;
constexpr int GROUPS = 2;                  // independent dependency chains
constexpr int64_t BLOCK = GROUPS * LANES;  // channels processed together, with their state in registers

// A block is two vectors, g = 0 and 1. In fp32 order they are its first and second half. In bf16
// order they are its even and odd channels, the low and high halves of 32-bit words, so that
// widening is a shift or a mask. If n < BLOCK, only the first n channels are loaded or stored.
#define EACH_GROUP _Pragma("GCC unroll 2") for (int g = 0; g < GROUPS; g++)
struct Block { wkv_float g[GROUPS]; };

template <class X, class E>
WKV_FN void read(X& x, const E* from, int64_t n) {
  __builtin_memcpy(&x, from, n * sizeof(E));
}
template <class X, class E> WKV_FN void write(E* to, const X& x, int64_t n) { __builtin_memcpy(to, &x, n * sizeof(E)); }

// Replaces every NaN by the canonical one. Other payload bits would reach the exponent in wkv_exp
// or overflow in round_to_bf16.
WKV_FN Block canonical_nan(Block x) {
  EACH_GROUP x.g[g] = x.g[g] == x.g[g] ? x.g[g] : wkv_float{} + __builtin_nanf("");
  return x;
}

// fp32 tensors, in the block order of E.
template <class E, bool FULL>
WKV_FN Block load(const float* from, int64_t n) {
  Block x = {};
  if (FULL) EACH_GROUP read(x.g[g], from + g * LANES, LANES);
  else read(x, from, n);
  if (sizeof(E) == 4) return x;
  wkv_int even;
  for (int i = 0; i < LANES; i++) even[i] = 2 * i;
  return {__builtin_shuffle(x.g[0], x.g[1], even), __builtin_shuffle(x.g[0], x.g[1], even + 1)};
}
template <class E, bool FULL>
WKV_FN void store(float* to, Block x, int64_t n) {
  if (sizeof(E) == 2) {
    wkv_int zip;
    for (int i = 0; i < LANES; i++) zip[i] = i / 2 + i % 2 * LANES;
    x = {__builtin_shuffle(x.g[0], x.g[1], zip), __builtin_shuffle(x.g[0], x.g[1], zip + LANES / 2)};
  }
  if (FULL) EACH_GROUP write(to + g * LANES, x.g[g], LANES);
  else write(to, x, n);
}
template <class E, bool FULL>
WKV_FN Block load(const bf16* from, int64_t n) {
  wkv_bits x = {};
  read(x, from, FULL ? BLOCK : n);
  return {(wkv_float)(x << 16), (wkv_float)(x & 0xffff0000u)};
}
// Rounds to bf16 in the upper half, ties to even. (The AVX-512 instruction, where used, flushes
// denormals to 0.) NaN stays NaN: no operation produces one with all bits set, and canonical_nan
// removes such inputs.
WKV_FN wkv_bits round_to_bf16(wkv_float x) {
  const wkv_bits bits = (wkv_bits)x;
  return bits + 0x7fffu + (bits >> 16 & 1u);
}
template <class E, bool FULL>
WKV_FN void store(bf16* to, const Block& x, int64_t n) {
#ifdef WKV_CONVERTS_BF16
  wkv_shorts zip;
  for (int i = 0; i < BLOCK; i++) zip[i] = i / 2 + i % 2 * LANES;
  write(to, __builtin_shuffle((wkv_shorts)_mm512_cvtne2ps_pbh((__m512)x.g[1], (__m512)x.g[0]), zip), FULL ? BLOCK : n);
#else
  write(to, round_to_bf16(x.g[0]) >> 16 | (round_to_bf16(x.g[1]) & 0xffff0000u), FULL ? BLOCK : n);
#endif
}

#define LOAD(from) load<E, FULL>(from, n)
#define STORE(to, x) store<E, FULL>(to, x, n)

}  // namespace
