// Access to 8 neighbouring elements of a tensor, or to single ones of any dtype, and reductions over a
// block; for the elementwise CUDA kernels.
#pragma once

#include "common/device.h"
#include "elementwise/fused_args.h"

namespace fused {

// ---- vectors of 8 elements ----

template <int W> struct Vec { float x[W]; };
typedef Vec<8> Vec8;
static_assert(FUSED_WIDTH == 8, "");
#define EACH _Pragma("unroll") for (int i = 0; i < W; i++)
struct alignas(16) Words4 { unsigned w[4]; };

WKV_FN Words4 load_words(const void* from) {
  const uint4 v = *(const uint4*)from;
  return {{v.x, v.y, v.z, v.w}};
}
WKV_FN void store_words(void* to, Words4 v) { *(uint4*)to = uint4{v.w[0], v.w[1], v.w[2], v.w[3]}; }

// 8 elements as they are in memory. What is read ahead stays so, as a conversion would wait for it.
template <class E> struct Raw8 { Words4 v; };  // 16-bit E
template <> struct Raw8<fp32> { Words4 low, high; };
template <class E> WKV_FN Raw8<E> load_raw8(const E* p) { return {load_words(p)}; }
WKV_FN Raw8<fp32> load_raw8(const fp32* p) { return {load_words(p), load_words(p + 4)}; }
template <class E> WKV_FN Vec8 of_raw8(Raw8<E> from) {
  Vec8 y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const E low = {(unsigned short)from.v.w[i]}, high = {(unsigned short)(from.v.w[i] >> 16)};
    y.x[2 * i] = load(&low);
    y.x[2 * i + 1] = load(&high);
  }
  return y;
}
WKV_FN Vec8 of_raw8(Raw8<fp32> from) {
  Vec8 y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    y.x[i] = as_float(from.low.w[i]);
    y.x[4 + i] = as_float(from.high.w[i]);
  }
  return y;
}
template <class E> WKV_FN Vec8 load_vec8(const E* p) { return of_raw8(load_raw8(p)); }
template <class E> WKV_FN void store_vec8(E* p, Vec8 x) {  // 16-bit E
  Words4 v;
#pragma unroll
  for (int i = 0; i < 4; i++) v.w[i] = two(p, x.x[2 * i], x.x[2 * i + 1]);
  store_words(p, v);
}
WKV_FN void store_vec8(fp32* p, Vec8 x) {
  Words4 low, high;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    low.w[i] = as_bits(x.x[i]);
    high.w[i] = as_bits(x.x[4 + i]);
  }
  store_words(p, low);
  store_words(p + 4, high);
}

// Access to a tensor from element `at` on: W = FUSED_WIDTH elements if all rows start at multiples of
// it and are 16-byte aligned, else single elements of a dtype known at run time. The latter is one kernel
// for all dtypes, which saves compile time.
template <class E> struct Vectorized {
  static constexpr int W = FUSED_WIDTH;
  typedef Raw8<E> Raw;
  WKV_MEMBER Raw raw(const void* from, long long at) const { return load_raw8((const E*)from + at); }
  WKV_MEMBER Vec<W> of_raw(Raw x) const { return of_raw8(x); }
  WKV_MEMBER float one(const void* from, long long at) const { return load((const E*)from + at); }
  WKV_MEMBER Vec<W> get(const void* from, long long at) const { return load_vec8((const E*)from + at); }
  WKV_MEMBER void put(void* to, long long at, Vec<W> x) const { store_vec8((E*)to + at, x); }
  WKV_MEMBER void put_one(void* to, long long at, float x) const { store((E*)to + at, x); }
  WKV_MEMBER float rounded(float x) const {
    E y;
    store(&y, x);
    return load(&y);
  }
};
struct AnyDtype {
  static constexpr int W = 1;
  typedef Vec<W> Raw;
  int dtype;
  WKV_MEMBER Raw raw(const void* from, long long at) const { return get(from, at); }
  WKV_MEMBER Vec<W> of_raw(Raw x) const { return x; }
  WKV_MEMBER float one(const void* from, long long at) const {
    if (dtype == DTYPE_FP32) return load((const fp32*)from + at);
    if (dtype == DTYPE_BF16) return load((const bf16*)from + at);
    return load((const fp16*)from + at);
  }
  WKV_MEMBER Vec<W> get(const void* from, long long at) const { return {{one(from, at)}}; }
  WKV_MEMBER void put(void* to, long long at, Vec<W> x) const { put_one(to, at, x.x[0]); }
  WKV_MEMBER void put_one(void* to, long long at, float x) const {
    if (dtype == DTYPE_FP32) store((fp32*)to + at, x);
    else if (dtype == DTYPE_BF16) store((bf16*)to + at, x);
    else store((fp16*)to + at, x);
  }
  WKV_MEMBER float rounded(float x) const {
    if (dtype == DTYPE_FP32) return x;
    if (dtype == DTYPE_BF16) return Vectorized<bf16>().rounded(x);
    return Vectorized<fp16>().rounded(x);
  }
};
template <int W> WKV_FN Vec<W> load_floats(const float* from, long long at) {
  if constexpr (W == 1) return {{from[at]}};
  else return load_vec8((const fp32*)from + at);
}
template <int W> WKV_FN void store_floats(float* to, long long at, Vec<W> x) {
  if constexpr (W == 1) to[at] = x.x[0];
  else store_vec8((fp32*)to + at, x);
}

// ---- reductions over a block ----

struct Add { template <class V> static WKV_MEMBER V of(V x, V y) { return x + y; } };
struct Min { template <class V> static WKV_MEMBER V of(V x, V y) { return x < y ? x : y; } };
struct Max { template <class V> static WKV_MEMBER V of(V x, V y) { return x > y ? x : y; } };

// Every thread gets the result. Of two reductions in succession, also around a loop, `buffer` must differ: then the
// barrier of one separates the reads of the other from the writes of a third.
template <class Op, int buffer, class V> WKV_FN V block_reduce(V x) {
  SHARED V of_warp[FUSED_ROW_THREADS / 32];
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = Op::of(x, shuffle_xor(x, mask));
  if (thread_number() % 32 == 0) of_warp[thread_number() / 32] = x;
  barrier();
  x = of_warp[0];
  for (unsigned i = 1; i < block_size() / 32; i++) x = Op::of(x, of_warp[i]);
  return x;
}

}  // namespace fused
