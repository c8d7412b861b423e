// Vectors of WKV_BYTES bytes for the CPU unit's loops: arithmetic, e^x, and blocks of neighbouring channels read from and written to fp32 or
// bf16. Included once by each file that names its target and WKV_BYTES.
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

// The second where one is NaN, as x > y ? x : y, which GCC does not always see to be one instruction.
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
// As unsigned integers: of floats without their sign the larger, and NaN above all.
WKV_FN wkv_bits wkv_max_bits(wkv_bits x, wkv_bits y) { return x > y ? x : y; }
WKV_FN wkv_float wkv_divide(wkv_float x, wkv_float y) { return x / y; }
WKV_FN wkv_float wkv_negative_magnitude(wkv_float x) { return (wkv_float)((wkv_bits)x | 0x80000000u); }

// e^x for x from -87 to 87, to 1.5 units in the last place: x = n·ln2 + r with |r| <= ln2/2, a polynomial for e^r, n added to the exponent's bits.
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

// e^x for x up to 87: below -87, where fp32's normal numbers end, it is 0. NaN stays NaN where its low 9 bits are 0 (see `tidy`).
WKV_FN wkv_float wkv_exp(wkv_float x) {
  const wkv_float least = wkv_float{} - 87.0f, power = wkv_exp_in_range(wkv_max(least, x));
  return least > x ? wkv_float{} : power;
}

WKV_FN bool all(wkv_int x) {  // of the truth values of a comparison
  int32_t found = -1;
  for (int i = 0; i < WKV_BYTES / 4; i++) found &= x[i];
  return found;
}

namespace {

struct bf16 { uint16_t bits; };
constexpr int LANES = WKV_BYTES / 4;
constexpr int GROUPS = 2;                  // two chains of dependent operations, side by side
constexpr int64_t BLOCK = GROUPS * LANES;  // channels whose state stays in registers while time runs


// A block is two vectors, g = 0 and 1. In fp32 they are its first and its second half; in bf16 its even and its odd channels, which are
// the low and the high halves of its 32-bit words, so that widening takes a shift or a mask. With n < BLOCK only the first n channels
// are read or written.
#define EACH_GROUP _Pragma("GCC unroll 2") for (int g = 0; g < GROUPS; g++)
struct Block { wkv_float g[GROUPS]; };

template <class X, class E> WKV_FN void read(X& x, const E* from, int64_t n) { __builtin_memcpy(&x, from, n * sizeof(E)); }
template <class X, class E> WKV_FN void write(E* to, const X& x, int64_t n) { __builtin_memcpy(to, &x, n * sizeof(E)); }

// Every NaN becomes the usual one: its low bits would reach the exponent in wkv_exp, or overflow in `nearest`.
WKV_FN Block tidy(Block x) {
  EACH_GROUP x.g[g] = x.g[g] == x.g[g] ? x.g[g] : wkv_float{} + __builtin_nanf("");
  return x;
}

// fp32 tensors, in the order that goes with E.
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
// bf16 in the upper half, ties to even. (The processor's own instruction, where it is used, takes denormal numbers for 0.) NaN stays NaN, as no operation makes one with all bits set (and `tidy` admits none).
WKV_FN wkv_bits nearest(wkv_float x) {
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
  write(to, nearest(x.g[0]) >> 16 | (nearest(x.g[1]) & 0xffff0000u), FULL ? BLOCK : n);
#endif
}

#define LOAD(from) load<E, FULL>(from, n)
#define STORE(to, x) store<E, FULL>(to, x, n)

}  // namespace
