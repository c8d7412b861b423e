// A thread's part of a WKV6 state, tokens in shared memory, and sums across threads (wkv6.cu).
#pragma once
#include "common/device.h"
#include "wkv6/wkv6_args.h"

namespace wkv6 {

#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#define EACH_KEY UNROLL for (int i = 0; i < S::KEYS; i++)
#define EACH_VALUE UNROLL for (int j = 0; j < S::VALUES; j++)
#define EACH_GROUP UNROLL for (int g = 0; g < S::VALUES / 4; g++)
#define EACH_OF_4 UNROLL for (int e = 0; e < 4; e++)

template <class E> struct alignas(4 * sizeof(E)) Four { E x[4]; };

// FLUSH: tokens whose sums over keys are in shared memory at once.
template <class E_, int WIDTH_, int FLUSH_>
struct Shape {
  using E = E_;
  static constexpr int WIDTH = WIDTH_, FLUSH = FLUSH_, STATES = WKV6_STATES;
  static constexpr int WARPS = WKV6_WARPS, THREADS = 32 * WARPS;
  static constexpr int LANES = 16;                 // threads with the same keys: half a warp
  static constexpr int VALUES = WIDTH / LANES, KEYS = WKV6_TILE / VALUES;  // of a thread
  static constexpr int BLOCK_KEYS = 2 * KEYS * WARPS;
  static constexpr int VECTORS = WIDTH / 4;        // per token and tensor
  static constexpr int STAGE = THREADS / VECTORS;  // tokens in shared memory: a vector per thread and tensor
  static_assert(STAGE % FLUSH == 0 && STAGE % STATES == 0 && WKV6_SAVE_INTERVAL % STAGE == 0, "whole parts");
};

template <class S> using State = float[S::KEYS][S::VALUES];
template <class S> using Keys = float[S::KEYS];
template <class S> using Values = float[S::VALUES];

enum { W, K, V, R, GY };  // staged tensors

struct Place {
  long long batch, head, index;  // index = batch * H + head
  long long segment, begin, end;  // its tokens
  int thread, warp, lane;        // lane: among the threads with the same keys
  int key, key_block;            // the first of its keys, in the head
};

template <class S> WKV_FN Place place(const Wkv6Args& q) {
  Place p;
  const long long block = block_number();
  p.key_block = (int)(block % q.key_blocks);
  p.segment = block / q.key_blocks % q.segments;
  p.index = block / q.key_blocks / q.segments;
  p.begin = p.segment * q.segment;
  p.end = p.segment < q.segments - 1 ? p.begin + q.segment : q.T;
  p.batch = p.index / q.H;
  p.head = p.index % q.H;
  p.thread = (int)thread_number();
  p.warp = p.thread / 32;
  p.lane = p.thread % S::LANES;
  p.key = p.key_block * S::BLOCK_KEYS + p.thread / S::LANES * S::KEYS;
  return p;
}

// The first value of a thread's group of 4.
template <class S> WKV_FN int value(const Place& p, int group) { return (group * S::LANES + p.lane) * 4; }
WKV_FN long long token(const Wkv6Args& q, const Place& p, long long t) {
  return ((p.batch * q.T + t) * q.H + p.head) * q.N;
}
// The same in y and gv.
WKV_FN long long summed_token(const Wkv6Args& q, const Place& p, long long t) {
  return p.key_block * q.B * q.T * q.H * q.N + token(q, p, t);
}
WKV_FN float* saved(const Wkv6Args& q, const Place& p, long long chunk) {
  return q.saved + (p.index * ((q.T + WKV6_SAVE_INTERVAL - 1) / WKV6_SAVE_INTERVAL) + chunk) * q.N * q.N;
}
WKV_FN float* state_of(float* states, const Wkv6Args& q, const Place& p) { return states + p.index * q.N * q.N; }
WKV_FN const float* state_of(const float* states, const Wkv6Args& q, const Place& p) {
  return states ? states + p.index * q.N * q.N : nullptr;
}
WKV_FN const float* segment_state(const float* states, const Wkv6Args& q, const Place& p) {
  return states ? states + (p.index * q.segments + p.segment) * q.N * q.N : nullptr;
}
// The index of a head among [segments, B, H].
WKV_FN long long summed_index(const Wkv6Args& q, const Place& p) { return p.segment * q.B * q.H + p.index; }
WKV_FN float* summed_state(float* states, const Wkv6Args& q, const Place& p) {
  return states + summed_index(q, p) * q.N * q.N;
}

// Zeros if `from` is null.
template <class S> WKV_FN void read_state(State<S>& x, const float* from, const Wkv6Args& q, const Place& p) {
  EACH_KEY EACH_GROUP {
    Four<float> four = {};
    if (from && p.key + i < q.N && value<S>(p, g) < q.N)
      four = *(const Four<float>*)(from + (p.key + i) * q.N + value<S>(p, g));
    EACH_OF_4 x[i][4 * g + e] = four.x[e];
  }
}
template <class S, bool ADD = false>
WKV_FN void write_state(float* to, const State<S>& x, const Wkv6Args& q, const Place& p) {
  EACH_KEY EACH_GROUP if (p.key + i < q.N && value<S>(p, g) < q.N) {
    Four<float>* at = (Four<float>*)(to + (p.key + i) * q.N + value<S>(p, g));
    Four<float> four = {};
    if (ADD) four = *at;
    EACH_OF_4 four.x[e] += x[i][4 * g + e];
    *at = four;
  }
}

// ---- tokens in shared memory ----

template <class S, int TENSORS> struct Tokens {
  Four<float> x[TENSORS][S::STAGE][S::VECTORS];  // W: e^w
  bool starts[S::STAGE];
};

// One vector of each tensor, on its way to shared memory.
template <class S, int TENSORS> struct Fetched {
  Four<typename S::E> x[TENSORS];
  Four<float> w;
  bool starts;
};

// Tokens before the first and after the last are zeros, with a log-decay of 0.
template <class S, int TENSORS>
WKV_FN Fetched<S, TENSORS> fetch(const Wkv6Args& q, const Place& p, long long begin) {
  using E = typename S::E;
  Fetched<S, TENSORS> to = {};
  const int column = p.thread % S::VECTORS * 4;
  const long long t = begin + p.thread / S::VECTORS;
  if (t >= 0 && t < q.T && column < q.N) {
    const long long at = token(q, p, t) + column;
    const void* tensors[] = {nullptr, q.k, q.v, q.r, q.gy};
    UNROLL for (int i = 0; i < TENSORS; i++) if (i != W) to.x[i] = *(const Four<E>*)((const E*)tensors[i] + at);
    to.w = *(const Four<float>*)(q.w + (q.constant ? p.head * q.N + column : at));
  }
  const long long start = begin + p.thread;
  if (q.reset && p.thread < S::STAGE && start >= 0 && start < q.T) to.starts = q.reset[p.batch * q.T + start] != 0;
  return to;
}
// Between barriers.
template <class S, int TENSORS>
WKV_FN void put(Tokens<S, TENSORS>& to, const Fetched<S, TENSORS>& from, const Place& p) {
  UNROLL for (int i = 0; i < TENSORS; i++) {
    Four<float> four;
    EACH_OF_4 four.x[e] = i == W ? wkv_exp(from.w.x[e]) : load(&from.x[i].x[e]);
    to.x[i][p.thread / S::VECTORS][p.thread % S::VECTORS] = four;
  }
  if (p.thread < S::STAGE) to.starts[p.thread] = from.starts;
}
template <class S> WKV_FN void keys(Keys<S>& to, const Four<float>* from, const Place& p) {
  struct alignas(4 * S::KEYS) Some { float x[S::KEYS]; };
  const Some some = *(const Some*)((const float*)from + p.key);
  EACH_KEY to[i] = some.x[i];
}
template <class S> WKV_FN void values(Values<S>& to, const Four<float>* from, const Place& p) {
  EACH_GROUP {
    const Four<float> four = from[g * S::LANES + p.lane];
    EACH_OF_4 to[4 * g + e] = four.x[e];
  }
}

// ---- sums ----

// The sum over all values for the key number lane % KEYS of this thread.
template <class S> WKV_FN float sum_values(Keys<S>& x, const Place& p) {
  UNROLL for (int mask = 1; mask < S::KEYS; mask *= 2) {
    const bool odd = p.lane & mask;
    UNROLL for (int i = 0; i < S::KEYS / 2 / mask; i++) {
      const float kept = odd ? x[2 * i + 1] : x[2 * i], given = odd ? x[2 * i] : x[2 * i + 1];
      x[i] = kept + shuffle_xor(given, mask);
    }
  }
  float sum = x[0];
  UNROLL for (int mask = S::KEYS; mask < S::LANES; mask *= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// Sums over keys of FLUSH tokens: a part per warp.
template <class S> using Partial = Four<float>[S::FLUSH][S::WARPS][S::VECTORS];

// Writes the sums over this warp's keys.
template <class S> WKV_FN void put_partial(Four<float>* to, const Values<S>& x, const Place& p) {
  const bool second = p.thread & S::LANES;  // two threads of a warp have the same values
  EACH_GROUP {
    const float* four = x + 4 * g;
    const float low = (second ? four[2] : four[0]) + shuffle_xor(second ? four[0] : four[2], S::LANES);
    const float high = (second ? four[3] : four[1]) + shuffle_xor(second ? four[1] : four[3], S::LANES);
    float* at = to[g * S::LANES + p.lane].x + 2 * second;
    at[0] = low;
    at[1] = high;
  }
}
// Writes the sums over this block's keys for the FLUSH tokens from `begin` on to y or gv.
template <class S> WKV_FN void flush(void* to, const Partial<S>& partial, const Wkv6Args& q, const Place& p, long long begin) {
  using E = typename S::E;
  barrier();
  for (int at = p.thread; at < S::FLUSH * S::VECTORS; at += S::THREADS) {
    const int i_token = at / S::VECTORS, vector = at % S::VECTORS;
    if (begin + i_token >= q.T || vector * 4 >= q.N) continue;
    Four<float> sum = {};
    UNROLL for (int warp = 0; warp < S::WARPS; warp++) {
      const Four<float> part = partial[i_token][warp][vector];
      EACH_OF_4 sum.x[e] += part.x[e];
    }
    Four<E> four;
    EACH_OF_4 store(&four.x[e], sum.x[e]);
    *(Four<E>*)((E*)to + summed_token(q, p, begin + i_token) + vector * 4) = four;
  }
  barrier();
}

}  // namespace wkv6
