// A thread's part of a WKV7 state, tokens in shared memory, and sums across threads (wkv7.cu).
#pragma once
#include "common/device.h"
#include "wkv7/wkv7_args.h"

namespace wkv7 {

#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")

template <class E> struct alignas(4 * sizeof(E)) Four { E x[4]; };

template <class E_, int WIDTH_, int ROWS_, int WARPS_>
struct Shape {
  using E = E_;
  static constexpr int WIDTH = WIDTH_, ROWS = ROWS_, WARPS = WARPS_;
  static constexpr int THREADS = 32 * WARPS, BLOCK_ROWS = WKV7_WARP_ROWS * WARPS;
  static constexpr int LANES = 32 * ROWS / WKV7_WARP_ROWS;  // that share their rows
  static constexpr int COLUMNS = WIDTH / LANES;             // of a thread
  static constexpr int VECTORS = WIDTH / 4;                 // per token and tensor
  static constexpr int STAGE = THREADS / VECTORS;           // tokens in shared memory: a vector per thread and tensor
};

template <class S> using State = float[S::ROWS][S::COLUMNS];
template <class S> using Keys = float[S::COLUMNS];
template <class S> using Values = float[S::ROWS];

enum { R, W, K, V, A, B, GY };  // staged tensors

struct Place {
  long long batch, head, index;  // index = batch * H + head
  int thread, lane;              // lane: among the threads with the same rows
  int local, row, row_block;     // the first of its rows, in the block and in the head
};

template <class S> WKV_FN Place place(const Wkv7Args& q) {
  Place p;
  const long long block = block_number();
  p.index = block / q.row_blocks;
  p.row_block = (int)(block % q.row_blocks);
  p.batch = p.index / q.H;
  p.head = p.index % q.H;
  p.thread = (int)thread_number();
  p.lane = p.thread % S::LANES;
  p.local = p.thread / S::LANES * S::ROWS;
  p.row = p.row_block * S::BLOCK_ROWS + p.local;
  return p;
}

// The first column of a thread's group of 4 columns.
template <class S> WKV_FN int column(const Place& p, int group) { return (group * S::LANES + p.lane) * 4; }
WKV_FN long long token(const Wkv7Args& q, const Place& p, long long t) {
  return ((p.batch * q.T + t) * q.H + p.head) * q.N;
}
WKV_FN float* saved(const Wkv7Args& q, const Place& p, long long chunk) {
  return q.saved + (p.index * ((q.T + WKV7_SAVE_INTERVAL - 1) / WKV7_SAVE_INTERVAL) + chunk) * q.N * q.N;
}
WKV_FN float* state_of(float* states, const Wkv7Args& q, const Place& p) { return states + p.index * q.N * q.N; }
WKV_FN const float* state_of(const float* states, const Wkv7Args& q, const Place& p) {
  return states ? states + p.index * q.N * q.N : nullptr;
}

#define EACH_ROW UNROLL for (int i = 0; i < S::ROWS; i++)
#define EACH_COLUMN UNROLL for (int j = 0; j < S::COLUMNS; j++)
#define EACH_GROUP UNROLL for (int g = 0; g < S::COLUMNS / 4; g++)
#define EACH_OF_4 UNROLL for (int e = 0; e < 4; e++)

// Zeros if `from` is null.
template <class S> WKV_FN void read_state(State<S>& x, const float* from, const Wkv7Args& q, const Place& p) {
  EACH_ROW EACH_GROUP {
    Four<float> four = {};
    if (from && p.row + i < q.N && column<S>(p, g) < q.N)
      four = *(const Four<float>*)(from + (p.row + i) * q.N + column<S>(p, g));
    EACH_OF_4 x[i][4 * g + e] = four.x[e];
  }
}
template <class S, bool ADD = false>
WKV_FN void write_state(float* to, const State<S>& x, const Wkv7Args& q, const Place& p) {
  EACH_ROW EACH_GROUP if (p.row + i < q.N && column<S>(p, g) < q.N) {
    Four<float>* at = (Four<float>*)(to + (p.row + i) * q.N + column<S>(p, g));
    Four<float> four = {};
    if (ADD) four = *at;
    EACH_OF_4 four.x[e] += x[i][4 * g + e];
    *at = four;
  }
}

// ---- tokens in shared memory ----

template <class S, int TENSORS> struct Tokens {
  Four<float> x[TENSORS][S::STAGE][S::VECTORS];
  bool starts[WKV7_SAVE_INTERVAL > S::STAGE ? WKV7_SAVE_INTERVAL : S::STAGE];
};

// One vector of each tensor, on its way to shared memory.
template <class S, int TENSORS> struct Fetched {
  Four<typename S::E> x[TENSORS];
  Four<float> w;
  bool starts;
};

template <class S, int TENSORS>
WKV_FN Fetched<S, TENSORS> fetch(const Wkv7Args& q, const Place& p, long long begin) {
  using E = typename S::E;
  Fetched<S, TENSORS> to = {};
  const int column = p.thread % S::VECTORS * 4;
  const long long t = begin + p.thread / S::VECTORS;
  if (t < q.T && column < q.N) {
    const long long at = token(q, p, t) + column;
    const void* tensors[] = {q.r, nullptr, q.k, q.v, q.a, q.b, q.gy};
    UNROLL for (int i = 0; i < TENSORS; i++) if (i != W) to.x[i] = *(const Four<E>*)((const E*)tensors[i] + at);
    to.w = *(const Four<float>*)(q.w + at);
  }
  if (q.reset && p.thread < S::STAGE && begin + p.thread < q.T)
    to.starts = q.reset[p.batch * q.T + begin + p.thread] != 0;
  return to;
}
// Between barriers. `slot`: the index of the first token in `starts`.
template <class S, int TENSORS>
WKV_FN void put(Tokens<S, TENSORS>& to, const Fetched<S, TENSORS>& from, const Place& p, int slot) {
  UNROLL for (int i = 0; i < TENSORS; i++) {
    Four<float> four;
    EACH_OF_4 four.x[e] = i == W ? wkv_exp(from.w.x[e]) : load(&from.x[i].x[e]);
    to.x[i][p.thread / S::VECTORS][p.thread % S::VECTORS] = four;
  }
  if (p.thread < S::STAGE) to.starts[slot + p.thread] = from.starts;
}
template <class S, int TENSORS> WKV_FN bool any_starts(const Tokens<S, TENSORS>& tokens) {
  bool any = false;
  UNROLL for (int i = 0; i < S::STAGE; i++) any |= tokens.starts[i];
  return any;
}
template <class S> WKV_FN void keys(Keys<S>& to, const Four<float>* from, const Place& p) {
  EACH_GROUP {
    const Four<float> four = from[g * S::LANES + p.lane];
    EACH_OF_4 to[4 * g + e] = four.x[e];
  }
}
template <class S> WKV_FN void values(Values<S>& to, const Four<float>* from, int row) {
  struct alignas(4 * S::ROWS) Rows { float x[S::ROWS]; };
  const Rows rows = *(const Rows*)((const float*)from + row);
  EACH_ROW to[i] = rows.x[i];
}

// ---- sums ----

// Of the columns of this thread; two sums, for shorter chains of dependent operations.
template <class S> WKV_FN float dot(const Keys<S>& x, const Keys<S>& y) {
  float even = 0, odd = 0;
  UNROLL for (int j = 0; j < S::COLUMNS; j += 2) {
    even += x[j] * y[j];
    odd += x[j + 1] * y[j + 1];
  }
  return even + odd;
}

// Sums over the columns of all threads with these rows, in each of them.
template <class S, int COUNT> WKV_FN void sum_columns(float (&x)[COUNT], const Place& p) {
  if (S::ROWS != 4) {
    UNROLL for (int mask = 1; mask < S::LANES; mask *= 2)
      UNROLL for (int i = 0; i < COUNT; i++) x[i] += shuffle_xor(x[i], mask);
    return;
  }
  // The same in half as many shuffles: each thread sums one row, and they exchange the sums.
  const bool odd = p.lane & 1, high = p.lane & 2;
  const float first = (odd ? x[S::ROWS / 2] : x[0]) + shuffle_xor(odd ? x[0] : x[S::ROWS / 2], 1);
  const float second = (odd ? x[S::ROWS - 1] : x[1]) + shuffle_xor(odd ? x[1] : x[S::ROWS - 1], 1);
  float sum = (high ? second : first) + shuffle_xor(high ? first : second, 2);
  UNROLL for (int mask = 4; mask < S::LANES; mask *= 2) sum += shuffle_xor(sum, mask);
  const float other = shuffle_xor(sum, 2), low_row = high ? other : sum, high_row = high ? sum : other;
  const float low_pair = shuffle_xor(low_row, 1), high_pair = shuffle_xor(high_row, 1);
  x[0] = odd ? low_pair : low_row;
  x[1] = odd ? high_pair : high_row;
  x[S::ROWS / 2] = odd ? low_row : low_pair;
  x[S::ROWS - 1] = odd ? high_row : high_pair;
}

}  // namespace wkv7
