// A fake NVIDIA driver: records the launcher's calls, and runs cuda/common/gpu.cu, compiled for the
// host, over all blocks and threads. tests/wkv/fake_gpu.py builds it as libcuda.so.1.
#include <immintrin.h>
#include <ucontext.h>

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

// The threads of a block take turns: each runs to its next barrier, then the next one does. It is an
// error if only some of them reach a barrier.
struct Thread {
  ucontext_t at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool ended;
};
static std::vector<Thread> block;
static ucontext_t scheduler;
static std::function<void()> running;
static unsigned block_index, thread_in_block, threads_of_block;
static void run_thread() {
  running();
  block[thread_in_block].ended = true;
}
static void run_block() {
  if (block.size() < threads_of_block) block.resize(threads_of_block);
  for (unsigned i = 0; i < threads_of_block; i++) {
    Thread& t = block[i];
    t.ended = false;
    getcontext(&t.at);
    t.at.uc_stack.ss_sp = t.stack.data();
    t.at.uc_stack.ss_size = t.stack.size();
    t.at.uc_link = &scheduler;
    makecontext(&t.at, run_thread, 0);
  }
  for (unsigned left = threads_of_block; left;) {
    const unsigned before = left;
    for (thread_in_block = 0; thread_in_block < threads_of_block; thread_in_block++) {
      if (block[thread_in_block].ended) continue;
      swapcontext(&scheduler, &block[thread_in_block].at);
      left -= block[thread_in_block].ended;
    }
    if (left && left != before) std::abort();  // some have ended while others wait
  }
}
WKV_FN void barrier() { swapcontext(&block[thread_in_block].at, &scheduler); }
WKV_FN void warp_barrier() { barrier(); }
// Two buffers in turn: one barrier separates writing and reading, and the next shuffle uses the other.
template <class V> WKV_FN V shuffle_xor(V x, int mask) {
  static V given[2][1024];
  static unsigned char turn[1024];
  V* now = given[turn[thread_in_block] ^= 1];
  now[thread_in_block] = x;
  barrier();
  return now[thread_in_block ^ unsigned(mask)];
}

WKV_FN float wkv_exp(float x) { return std::exp(x); }
WKV_FN float wkv_max(float x, float y) { return std::fmax(x, y); }
WKV_FN float wkv_negative_magnitude(float x) { return -std::fabs(x); }
WKV_FN float wkv_divide(float x, float y) { return x / y; }
WKV_FN float square_root(float x) { return std::sqrt(x); }
WKV_FN float as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
WKV_FN unsigned as_bits(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
__attribute__((target("f16c"))) static float fp16_to_float(unsigned short x) { return _cvtsh_ss(x); }
__attribute__((target("f16c"))) static unsigned short float_to_fp16(float x) { return _cvtss_sh(x, 0); }
WKV_FN unsigned short float_to_bf16(float x) { const unsigned bits = as_bits(x); return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu; }
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
#define WKV6_OF(E) WKV6(wkv6_output_##E), WKV6(wkv6_gradient_##E)
#define FUSED(name) {#name, kernel(fused::name)}
#define FUSED_ROW(name) {#name, kernel(fused::name, true)}
#define FUSED_OF_TWO(E) FUSED_ROW(fused_norm_##E), FUSED_ROW(fused_norm_gradient_##E), FUSED(fused_norm_sums_##E)
#define FUSED_OF(E)                                                                                                            \
  FUSED_OF_TWO(E), FUSED(fused_gate_##E), FUSED(fused_gate_gradient_##E), FUSED(fused_mix_##E), FUSED(fused_mix_gradient_##E), FUSED(fused_relu2_##E), FUSED(fused_relu2_gradient_##E), \
      FUSED(fused_dropout_##E), FUSED_ROW(fused_loss_##E)
#define TIME_MIX_OF(E) FUSED_ROW(fused_keys_##E), FUSED_ROW(fused_keys_gradient_##E), FUSED_ROW(fused_head_gate_##E), FUSED_ROW(fused_head_gate_gradient_##E)
#define QUANT(name) {#name, kernel(quant::name)}
#define QUANT_OF(E) QUANT(quant_nf4_##E), QUANT(quant_int8_##E)
static const std::map<std::string, Kernel> kernels = {WKV_OF(fp32), WKV_OF(bf16), WKV_OF(fp16), WKV(wkv4_scan), WKV(wkv4_scan_gradient),
                                                      WKV7_OF(fp32), WKV7_OF(bf16), WKV7_OF(fp16), WKV7(wkv7_output_128), WKV7(wkv7_output_256), WKV7(wkv7_gradient_128), WKV7(wkv7_gradient_256),
                                                      WKV6_OF(fp32), WKV6_OF(bf16), WKV6_OF(fp16), WKV6_OF(wide),
                                                      FUSED_OF(fp32), FUSED_OF(bf16), FUSED_OF(fp16), FUSED_OF(any), FUSED_OF_TWO(fp32_bf16), FUSED_OF_TWO(fp32_fp16),
                                                      TIME_MIX_OF(fp32), TIME_MIX_OF(bf16), TIME_MIX_OF(fp16),
                                                      QUANT_OF(fp32), QUANT_OF(bf16), QUANT_OF(fp16)};

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
const char* fake_calls() { answer = record.str(); record.str(""); return answer.c_str(); }  // since the last call
void fake_failure(const char* which, int result) { failing = which; failure = result; }       // calls starting with `which` return `result`

int cuInit(unsigned flags) { return log_call(call("cuInit", flags)); }
int cuGetErrorName(int, const char** name) { *name = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "a made-up error"; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 100 + ordinal; return log_call(call("cuDeviceGet", ordinal)); }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &contexts; return log_call(call("cuDevicePrimaryCtxRetain", device)); }
int cuCtxPushCurrent_v2(void* context) { current.push_back(context); return log_call("cuCtxPushCurrent"); }
int cuCtxPopCurrent_v2(void** context) { *context = current.back(); current.pop_back(); return log_call("cuCtxPopCurrent"); }
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
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                   void** parameters, void** extra) {
  const auto& [name, kernel] = *static_cast<const std::pair<const std::string, Kernel>*>(function);
  const int result = log_call(call("cuLaunchKernel", name, gx, gy, gz, bx, by, bz, shared, stream, extra == nullptr, current.size()));
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
