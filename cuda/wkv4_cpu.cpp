// The CPU unit of the RWKV-4 WKV operator: torch.ops.rwkv.wkv4_forward / wkv4_backward (fp32, any B, T, C).
//
// Threads share out (batch row) x (block of 64 channels); time runs serially inside, the loop over the block's channels is
// vectorised, its exponentials by the vector maths library (libmvec). Compiled once per vector width; the widest one the
// processor has is chosen when the library is loaded, so a file built on one x86-64 machine runs on every other.
//
// The forward pass keeps the state of every 32nd token; the backward pass recomputes the 31 between. Memory beyond the
// outputs: 3/32 of one [B, T, C] fp32 tensor, whatever T.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "wkv4.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WKV_EVERY_WIDTH __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define WKV_EVERY_WIDTH
#endif

namespace {

using c10::optional;
constexpr int64_t KEEP = 32;   // tokens per kept state
constexpr int64_t BLOCK = 64;  // channels per block: 256 bytes of every row, and the states of 32 tokens in the first-level cache

struct Problem {
  int64_t T, C;
  const float *w, *u;    // [C]
  const float *k, *v;    // [B, T, C]
  const bool* reset;     // [B, T] or null
  const float* first;    // [B, 3, C], the incoming state, or null
  float* kept;           // [B, ceil(T / KEEP), 3, C], the state before token 0, 32, 64, ...
};

WKV_FN void clear(int64_t n, float* a, float* b, float* p) {
  for (int64_t i = 0; i < n; i++) { a[i] = 0; b[i] = 0; p[i] = WKV_EMPTY; }
}

WKV_FN void load(int64_t n, int64_t C, const float* from, float* a, float* b, float* p) {
  for (int64_t i = 0; i < n; i++) { a[i] = from[i]; b[i] = from[C + i]; p[i] = from[2 * C + i]; }
}

WKV_FN void store(int64_t n, int64_t C, float* to, const float* a, const float* b, const float* p) {
  for (int64_t i = 0; i < n; i++) { to[i] = a[i]; to[C + i] = b[i]; to[2 * C + i] = p[i]; }
}

// Channels [c, c+n) of batch row `row`, all T tokens forward in time.
WKV_EVERY_WIDTH void forward_block(const Problem& q, int64_t row, int64_t c, int64_t n, float* y, float* last) {
  float a[BLOCK], b[BLOCK], p[BLOCK];
  const float *w = q.w + c, *u = q.u + c;
  const int64_t chunks = (q.T + KEEP - 1) / KEEP;
  if (q.first) load(n, q.C, q.first + row * 3 * q.C + c, a, b, p); else clear(n, a, b, p);
  for (int64_t t = 0; t < q.T; t++) {
    if (t % KEEP == 0) store(n, q.C, q.kept + (row * chunks + t / KEEP) * 3 * q.C + c, a, b, p);
    if (q.reset && q.reset[row * q.T + t]) clear(n, a, b, p);
    const int64_t at = (row * q.T + t) * q.C + c;
    const float *k = q.k + at, *v = q.v + at;
    float* out = y + at;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
      out[i] = wkv4_output(u[i], k[i], v[i], a[i], b[i], p[i]);
      wkv4_update(w[i], k[i], v[i], a[i], b[i], p[i]);
    }
  }
  store(n, q.C, last + row * 3 * q.C + c, a, b, p);
}

struct Gradients {
  const float *y, *last;       // [B, T, C] and [B, 3, C] or null: gradients of the two outputs
  float *w, *u;                // [B, C], summed over the batch by the caller
  float *k, *v;                // [B, T, C]
  float* first;                // [B, 3, C]
};

WKV_EVERY_WIDTH void backward_block(const Problem& q, const Gradients& g, int64_t row, int64_t c, int64_t n) {
  float a[KEEP][BLOCK], b[KEEP][BLOCK], p[KEEP][BLOCK];  // the states before the tokens of one chunk
  float ga[BLOCK] = {}, gb[BLOCK] = {}, gw[BLOCK] = {}, gu[BLOCK] = {};
  const float *w = q.w + c, *u = q.u + c;
  const int64_t chunks = (q.T + KEEP - 1) / KEEP;
  if (g.last)
    for (int64_t i = 0; i < n; i++) { ga[i] = g.last[row * 3 * q.C + c + i]; gb[i] = g.last[(row * 3 + 1) * q.C + c + i]; }
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * KEEP, length = std::min(KEEP, q.T - begin);
    load(n, q.C, q.kept + (row * chunks + chunk) * 3 * q.C + c, a[0], b[0], p[0]);
    for (int64_t s = 0; s < length; s++) {
      if (q.reset && q.reset[row * q.T + begin + s]) clear(n, a[s], b[s], p[s]);
      if (s + 1 == length) break;
      const int64_t at = (row * q.T + begin + s) * q.C + c;
      const float *k = q.k + at, *v = q.v + at;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++) {
        float x = a[s][i], z = b[s][i], m = p[s][i];
        wkv4_update(w[i], k[i], v[i], x, z, m);
        a[s + 1][i] = x; b[s + 1][i] = z; p[s + 1][i] = m;
      }
    }
    for (int64_t s = length - 1; s >= 0; s--) {
      const int64_t at = (row * q.T + begin + s) * q.C + c;
      const float *k = q.k + at, *v = q.v + at, *gy = g.y + at;
      float *gk = g.k + at, *gv = g.v + at;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; i++)
        wkv4_backward(w[i], u[i], k[i], v[i], a[s][i], b[s][i], p[s][i], gy[i], ga[i], gb[i], gw[i], gu[i], gk[i], gv[i]);
      if (q.reset && q.reset[row * q.T + begin + s])  // nothing before a document's start reaches it
        for (int64_t i = 0; i < n; i++) { ga[i] = 0; gb[i] = 0; }
    }
  }
  for (int64_t i = 0; i < n; i++) {
    g.w[row * q.C + c + i] = gw[i];
    g.u[row * q.C + c + i] = gu[i];
    float* to = g.first + row * 3 * q.C + c + i;
    to[0] = ga[i]; to[q.C] = gb[i]; to[2 * q.C] = 0;
  }
}

Problem problem(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v, const optional<at::Tensor>& state,
                const optional<at::Tensor>& reset, const at::Tensor& kept) {
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  for (const at::Tensor& x : {w, u, k, v, kept})
    TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat && x.device().is_cpu(), "wkv4 on CPU takes contiguous fp32 CPU tensors");
  TORCH_CHECK(w.numel() == C && u.numel() == C && v.sizes() == k.sizes(), "wkv4: w and u are [C], k and v [B, T, C]");
  if (state) TORCH_CHECK(state->is_contiguous() && state->scalar_type() == at::kFloat && state->numel() == B * 3 * C, "wkv4: state is fp32 [B, 3, C]");
  if (reset) TORCH_CHECK(reset->is_contiguous() && reset->scalar_type() == at::kBool && reset->numel() == B * T, "wkv4: reset is bool [B, T]");
  return {T, C, w.data_ptr<float>(), u.data_ptr<float>(), k.data_ptr<float>(), v.data_ptr<float>(), reset ? reset->data_ptr<bool>() : nullptr,
          state ? state->data_ptr<float>() : nullptr, kept.data_ptr<float>()};
}

template <class F>
void each_block(int64_t B, int64_t C, const F& work) {
  const int64_t blocks = (C + BLOCK - 1) / BLOCK;
  at::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t c = i % blocks * BLOCK;
      work(i / blocks, c, std::min(BLOCK, C - c));
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
                                                       const optional<at::Tensor>& state, const optional<at::Tensor>& reset) {
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  at::Tensor y = at::empty_like(k), last = at::empty({B, 3, C}, k.options()), kept = at::empty({B, (T + KEEP - 1) / KEEP, 3, C}, k.options());
  const Problem q = problem(w, u, k, v, state, reset, kept);
  each_block(B, C, [&](int64_t row, int64_t c, int64_t n) { forward_block(q, row, c, n, y.data_ptr<float>(), last.data_ptr<float>()); });
  return {y, last, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                                                const at::Tensor& v, const optional<at::Tensor>& reset,
                                                                                const at::Tensor& kept, const at::Tensor& gy,
                                                                                const optional<at::Tensor>& glast) {
  const int64_t B = k.size(0), C = k.size(2);
  at::Tensor gw = at::empty({B, C}, k.options()), gu = at::empty({B, C}, k.options()), gk = at::empty_like(k), gv = at::empty_like(v);
  at::Tensor gfirst = at::empty({B, 3, C}, k.options());
  const Problem q = problem(w, u, k, v, {}, reset, kept);
  TORCH_CHECK(gy.is_contiguous() && gy.scalar_type() == at::kFloat && gy.sizes() == k.sizes(), "wkv4: gy is contiguous fp32 [B, T, C]");
  if (glast) TORCH_CHECK(glast->is_contiguous() && glast->scalar_type() == at::kFloat && glast->numel() == B * 3 * C, "wkv4: gstate is fp32 [B, 3, C]");
  const Gradients g{gy.data_ptr<float>(), glast ? glast->data_ptr<float>() : nullptr, gw.data_ptr<float>(), gu.data_ptr<float>(),
                    gk.data_ptr<float>(), gv.data_ptr<float>(), gfirst.data_ptr<float>()};
  each_block(B, C, [&](int64_t row, int64_t c, int64_t n) { backward_block(q, g, row, c, n); });
  return {gw.sum(0), gu.sum(0), gk, gv, gfirst};
}

}  // namespace

TORCH_LIBRARY(rwkv, library) {
  library.def("wkv4_forward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? reset) -> (Tensor y, Tensor state, Tensor kept)");
  library.def(
      "wkv4_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? reset, Tensor kept, Tensor gy, Tensor? gstate)"
      " -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate)");
}

TORCH_LIBRARY_IMPL(rwkv, CPU, library) {
  library.impl("wkv4_forward", forward);
  library.impl("wkv4_backward", backward);
}
