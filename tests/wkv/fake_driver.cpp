// A fake NVIDIA driver: records the launcher's calls, and runs cuda/common/gpu.cu, compiled for the
// host, over all blocks and threads. tests/wkv/fake_gpu.py builds it as libcuda.so.1.
#include <immintrin.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#define WKV_FN static inline
#define WKV_MEMBER inline
#define KERNEL(...) extern "C" void
#define SHARED static
typedef float wkv_float;
typedef unsigned wkv_bits;
struct alignas(16) uint4 { unsigned x, y, z, w; };

#define TENSOR_CORES

// The threads of a block take turns: each runs until it has to wait at a barrier, of the block or of its warp. It is
// an error if none of them can go on. Turns are taken by longjmp, as swapcontext calls the kernel.
struct Barrier { unsigned arrived, passed; };
struct Thread {
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool started, ended;
  const Barrier* waits;
  unsigned passed;  // of `waits`, when this thread arrived
};
static std::vector<Thread> block;
static Barrier block_barrier, warp_barriers[32];
static jmp_buf scheduler;
static std::function<void()> running;
static unsigned block_index, thread_in_block, threads_of_block;
static void run_thread() {
  running();
  block[thread_in_block].ended = true;
  _longjmp(scheduler, 1);
}
__attribute__((noinline)) static void resume(Thread& t) {
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.at, 1);
  t.started = true;
  setcontext(&t.start);
}
static void run_block() {
  if (block.size() < threads_of_block) block.resize(threads_of_block);
  block_barrier = {};
  std::memset(warp_barriers, 0, sizeof warp_barriers);
  for (unsigned i = 0; i < threads_of_block; i++) {
    Thread& t = block[i];
    t.started = t.ended = false;
    t.waits = nullptr;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.data();
    t.start.uc_stack.ss_size = t.stack.size();
    t.start.uc_link = nullptr;
    makecontext(&t.start, run_thread, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (thread_in_block = 0; thread_in_block < threads_of_block; thread_in_block++) {
      Thread& t = block[thread_in_block];
      if (t.ended || (t.waits && t.waits->passed == t.passed)) continue;
      progress = true;
      resume(t);
    }
  }
  for (unsigned i = 0; i < threads_of_block; i++)
    if (!block[i].ended) std::abort();  // some threads wait for others that have ended or wait elsewhere
}
__attribute__((noinline)) static void arrive(Barrier& at, unsigned threads) {
  Thread& t = block[thread_in_block];
  t.waits = &at;
  t.passed = at.passed;
  if (++at.arrived == threads) {
    at.arrived = 0;
    at.passed++;
    return;
  }
  if (!_setjmp(t.at)) _longjmp(scheduler, 1);
}
WKV_FN void barrier() { arrive(block_barrier, threads_of_block); }
WKV_FN void warp_barrier() {
  const unsigned warp = thread_in_block / 32;
  arrive(warp_barriers[warp], std::min(32u, threads_of_block - 32 * warp));
}
// Two buffers in turn: one barrier separates writing and reading, and the next exchange uses the other.
template <class V> struct Exchange {
  V given[2][1024];
  unsigned char turn[1024];
  const V* operator()(const V& x) {
    V* now = given[turn[thread_in_block] ^= 1];
    now[thread_in_block] = x;
    warp_barrier();
    return now;
  }
};
template <class V> WKV_FN V shuffle_xor(V x, int mask) {
  static Exchange<V> exchange;
  return exchange(x)[thread_in_block ^ unsigned(mask)];
}

WKV_FN float as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
WKV_FN unsigned as_bits(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static float towards_zero(double x) {
  const float y = float(x);
  return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}
// Operands as the PTX manual places them in a warp (mma.m16n8k8 with .tf32). They are cut to TF32; sums of four
// products are exact, and are added by rounding towards zero.
static void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Operands { float a[4], b[2]; };
  static Exchange<Operands> exchange;
  Operands mine;
  for (int i = 0; i < 4; i++) mine.a[i] = as_float(a[i] & 0xffffe000u);
  for (int i = 0; i < 2; i++) mine.b[i] = as_float(b[i] & 0xffffe000u);
  const Operands* warp = exchange(mine) + thread_in_block / 32 * 32;
  const unsigned lane = thread_in_block % 32;
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
    for (unsigned half = 0; half < 2; half++) {  // columns 0 to 3 of a, 4 to 7
      double sum = d[i];
      for (unsigned k = 0; k < 4; k++)
        sum += double(warp[row % 8 * 4 + k].a[row / 8 + 2 * half]) * warp[column * 4 + k].b[half];
      d[i] = towards_zero(sum);
    }
  }
}

// As device.h: the exponent is rounded, and numbers below 2^-126 are 0. (The hardware's 2^x and 1/x are exact to 2^-22.)
static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
WKV_FN float wkv_exp(float x) { return flushed(std::exp2(x * 1.44269504f)); }
WKV_FN float precise_exp(float x) { return std::exp(x); }
WKV_FN float wkv_max(float x, float y) { return std::fmax(x, y); }
WKV_FN float wkv_negative_magnitude(float x) { return -std::fabs(x); }
WKV_FN float wkv_divide(float x, float y) { return x * flushed(1.0f / flushed(y)); }
WKV_FN float square_root(float x) { return std::sqrt(x); }
__attribute__((target("f16c"))) static float fp16_to_float(unsigned short x) { return _cvtsh_ss(x); }
__attribute__((target("f16c"))) static unsigned short float_to_fp16(float x) { return _cvtss_sh(x, 0); }
WKV_FN unsigned short float_to_bf16(float x) {
  const unsigned bits = as_bits(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
}
WKV_FN unsigned float_to_two_bf16(float low, float high) { return float_to_bf16(low) | unsigned(float_to_bf16(high)) << 16; }
WKV_FN unsigned float_to_two_fp16(float low, float high) { return float_to_fp16(low) | unsigned(float_to_fp16(high)) << 16; }
WKV_FN float multiply(float x, float y) { return x * y; }
WKV_FN unsigned block_number() { return block_index; }
WKV_FN unsigned thread_number() { return thread_in_block; }
WKV_FN unsigned block_size() { return threads_of_block; }
WKV_FN long long thread_index() { return (long long)block_index * threads_of_block + thread_in_block; }

#include "common/gpu.cu"

struct Kernel {
  std::function<void(const void*)> run;
  bool barriers;  // whether its threads take turns; otherwise they run one after the other
};
template <class Args> static Kernel kernel(void (*function)(Args), bool barriers = false) {
  return {[=](const void* args) { function(*static_cast<const std::remove_const_t<Args>*>(args)); }, barriers};
}
#define WKV(name) {#name, kernel(wkv::name)}
#define WKV_OF(E) WKV(wkv4_summary_##E), WKV(wkv4_output_##E), WKV(wkv4_summary_gradient_##E), WKV(wkv4_gradient_##E)
#define WKV7(name) {#name, kernel(wkv7::name, true)}
#define WKV7_OF(E) WKV7(wkv7_output_##E), WKV7(wkv7_gradient_##E)
#define WKV6(name) {#name, kernel(wkv6::name, true)}
#define WKV6_OF(E) WKV6(wkv6_summary_##E), WKV6(wkv6_output_##E), WKV6(wkv6_gradient_##E)
#define WKV7_CHUNKS(name) {#name, kernel(wkv7_chunk::name, true)}
#define FUSED(name) {#name, kernel(fused::name)}
#define FUSED_ROW(name) {#name, kernel(fused::name, true)}
#define FUSED_OF_TWO(E) FUSED_ROW(fused_norm_##E), FUSED_ROW(fused_norm_gradient_##E), FUSED(fused_norm_sums_##E)
#define FUSED_OF(E)                                                                               \
  FUSED_OF_TWO(E), FUSED(fused_gate_##E), FUSED(fused_gate_gradient_##E), FUSED(fused_mix_##E),   \
      FUSED(fused_mix_gradient_##E), FUSED(fused_relu2_##E), FUSED(fused_relu2_gradient_##E),     \
      FUSED(fused_dropout_##E), FUSED_ROW(fused_loss_##E)
#define SHIFT_OF(E) FUSED(fused_shift_##E), FUSED(fused_shift_gradient_##E)
#define TIME_MIX_OF(E)                                                                            \
  FUSED_ROW(fused_keys_##E), FUSED_ROW(fused_keys_gradient_##E), FUSED_ROW(fused_head_gate_##E),  \
      FUSED_ROW(fused_head_gate_gradient_##E)
#define QUANT(name) {#name, kernel(quant::name)}
#define QUANT_OF(E) QUANT(quant_nf4_##E), QUANT(quant_int8_##E)
#define ADAMW(name, barriers) {#name, kernel(optimizer::name, barriers)}
#define ADAMW_OF(E) ADAMW(adamw_8bit_##E, true), ADAMW(adamw_full_##E, false)
static const std::map<std::string, Kernel> kernels = {
    WKV_OF(fp32), WKV_OF(bf16), WKV_OF(fp16), WKV(wkv4_scan), WKV(wkv4_scan_gradient),
    WKV7_OF(fp32), WKV7_OF(bf16), WKV7_OF(fp16),
    WKV7(wkv7_output_128), WKV7(wkv7_output_256), WKV7(wkv7_gradient_128), WKV7(wkv7_gradient_256),
    WKV6_OF(fp32), WKV6_OF(bf16), WKV6_OF(fp16), WKV6_OF(wide), WKV6(wkv6_scan),
    WKV7_CHUNKS(wkv7_chunk_prepare), WKV7_CHUNKS(wkv7_chunk_scan), WKV7_CHUNKS(wkv7_chunk_output),
    WKV7_CHUNKS(wkv7_chunk_scan_gradient), WKV7_CHUNKS(wkv7_chunk_gradient),
    FUSED_OF(fp32), FUSED_OF(bf16), FUSED_OF(fp16), FUSED_OF(any), FUSED_OF_TWO(fp32_bf16), FUSED_OF_TWO(fp32_fp16),
    TIME_MIX_OF(fp32), TIME_MIX_OF(bf16), TIME_MIX_OF(fp16),
    SHIFT_OF(fp32), SHIFT_OF(bf16), SHIFT_OF(fp16), SHIFT_OF(any),
    QUANT_OF(fp32), QUANT_OF(bf16), QUANT_OF(fp16), ADAMW_OF(fp32), ADAMW_OF(bf16)};

static std::ostringstream record;
static std::string answer, failing;
static int failure;
static int contexts;  // dummy targets of handles
static std::vector<void*> current;

static int log_call(const std::string& call) {
  record << call << "\n";
  return failing.size() && call.compare(0, failing.size(), failing) == 0 ? failure : 0;
}
template <class... A> static std::string call(const char* name, A... a) {
  std::ostringstream s;
  s << name;
  using expand = int[];
  (void)expand{0, (s << " " << a, 0)...};
  return s.str();
}

extern "C" {
// The calls since the last fake_calls().
const char* fake_calls() { answer = record.str(); record.str(""); return answer.c_str(); }
// Calls that start with `which` return `result`.
void fake_failure(const char* which, int result) { failing = which; failure = result; }

int cuInit(unsigned flags) { return log_call(call("cuInit", flags)); }
int cuGetErrorName(int, const char** name) { *name = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "a made-up error"; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 100 + ordinal; return log_call(call("cuDeviceGet", ordinal)); }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts;
  return log_call(call("cuDevicePrimaryCtxRetain", device));
}
int cuCtxPushCurrent_v2(void* context) { current.push_back(context); return log_call("cuCtxPushCurrent"); }
int cuCtxPopCurrent_v2(void** context) {
  *context = current.back();
  current.pop_back();
  return log_call("cuCtxPopCurrent");
}
int cuModuleLoadData(void** module, const void* image) {
  *module = &contexts;
  return log_call(call("cuModuleLoadData", std::string(static_cast<const char*>(image) + 1, 3), current.size()));
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  const auto found = kernels.find(name);
  *function = found == kernels.end() ? nullptr : const_cast<void*>(static_cast<const void*>(&*found));
  const int result = log_call(call("cuModuleGetFunction", name));
  return *function ? result : 500;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const auto& [name, kernel] = *static_cast<const std::pair<const std::string, Kernel>*>(function);
  const int result = log_call(
      call("cuLaunchKernel", name, gx, gy, gz, bx, by, bz, shared, stream, extra == nullptr, current.size()));
  if (result) return result;
  threads_of_block = bx;
  running = [run = kernel.run, args = parameters[0]] { run(args); };
  for (block_index = 0; block_index < gx; block_index++) {
    if (kernel.barriers) run_block();
    else
      for (thread_in_block = 0; thread_in_block < bx; thread_in_block++) running();
  }
  return 0;
}
}
