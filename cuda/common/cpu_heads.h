// Vectors for the CPU loops of operators with a matrix-valued state by head (WKV6, WKV7): rows of a
// head, in fp32 or bf16, and columns of its state.
#pragma once
#include "common/cpu_block.h"

namespace {

WKV_FN wkv_float vector_at(const float* from) {
  wkv_float x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}
WKV_FN void put(float* to, wkv_float x) { __builtin_memcpy(to, &x, sizeof(x)); }
WKV_FN float sum(wkv_float x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

WKV_FN float to_float(float x) { return x; }
WKV_FN float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
WKV_FN void from_float(float& to, float x) { to = x; }
WKV_FN void from_float(bf16& to, float x) {  // ties to even; every NaN becomes the canonical one
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Columns processed together, so that their sums stay in registers.
template <int FIXED> struct Group { static constexpr int count = FIXED ? 4 : 16 / LANES, columns = count * LANES; };

template <class E> WKV_FN void read_row(float* to, const void* tensor, int64_t at, int64_t N) {
  const E* from = static_cast<const E*>(tensor) + at;
  for (int64_t i = 0; i < N; i++) to[i] = to_float(from[i]);
}
template <class E> WKV_FN void write_row(void* tensor, int64_t at, const float* from, int64_t N) {
  E* to = static_cast<E*>(tensor) + at;
  for (int64_t i = 0; i < N; i++) from_float(to[i], from[i]);
}

WKV_FN void transpose(float* to, const float* from, int64_t N) {
  for (int64_t i = 0; i < N; i++)
    for (int64_t j = 0; j < N; j++) to[j * N + i] = from[i * N + j];
}

}  // namespace
