// A stand-in for NVIDIA's driver: records every call the launcher makes, and runs cuda/wkv4.cu, compiled for the host, over all blocks
// and threads. tests/wkv/fake_gpu.py builds it as libcuda.so.1.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#define WKV_FN static inline
#define WKV_KERNEL extern "C" void
typedef float wkv_float;
struct Dim { unsigned x; };
static thread_local Dim block_index, thread_in_block;
static unsigned block_size;
WKV_FN float wkv_exp(float x) { return std::exp(x); }
WKV_FN float wkv_max(float x, float y) { return std::fmax(x, y); }
WKV_FN float wkv_negative_magnitude(float x) { return -std::fabs(x); }
WKV_FN float wkv_divide(float x, float y) { return x / y; }
WKV_FN float as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static unsigned as_bits(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
__attribute__((target("f16c"))) static float fp16_to_float(unsigned short x) { return _cvtsh_ss(x); }
__attribute__((target("f16c"))) static unsigned short float_to_fp16(float x) { return _cvtss_sh(x, 0); }
WKV_FN unsigned short float_to_bf16(float x) { const unsigned bits = as_bits(x); return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu; }
WKV_FN float multiply(float x, float y) { return x * y; }
WKV_FN long long thread_index() { return (long long)block_index.x * block_size + thread_in_block.x; }

#include "wkv4.cu"

using Kernel = void (*)(Wkv4Args);
#define NAMED(name) {#name, name}
#define NAMED_OF(E) NAMED(wkv4_summary_##E), NAMED(wkv4_output_##E), NAMED(wkv4_summary_gradient_##E), NAMED(wkv4_gradient_##E)
static const std::map<std::string, Kernel> kernels = {NAMED_OF(fp32), NAMED_OF(bf16), NAMED_OF(fp16), NAMED(wkv4_scan), NAMED(wkv4_scan_gradient)};

static std::ostringstream record;
static std::string answer, failing;
static int failure;
static int contexts;  // dummies to point at
static std::vector<void*> current;

static int done(const std::string& call) {
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
const char* fake_calls() { answer = record.str(); record.str(""); return answer.c_str(); }  // since the last time
void fake_failure(const char* which, int result) { failing = which; failure = result; }       // calls that begin so fail from now on

int cuInit(unsigned flags) { return done(call("cuInit", flags)); }
int cuGetErrorName(int, const char** name) { *name = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "a made-up error"; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 100 + ordinal; return done(call("cuDeviceGet", ordinal)); }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &contexts; return done(call("cuDevicePrimaryCtxRetain", device)); }
int cuCtxPushCurrent_v2(void* context) { current.push_back(context); return done("cuCtxPushCurrent"); }
int cuCtxPopCurrent_v2(void** context) { *context = current.back(); current.pop_back(); return done("cuCtxPopCurrent"); }
int cuModuleLoadData(void** module, const void* image) {
  *module = &contexts;
  return done(call("cuModuleLoadData", std::string(static_cast<const char*>(image) + 1, 3), current.size()));
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = kernels.count(name) ? reinterpret_cast<void*>(kernels.at(name)) : nullptr;
  const int result = done(call("cuModuleGetFunction", name));
  return *function ? result : 500;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                   void** parameters, void** extra) {
  const Wkv4Args& args = *static_cast<Wkv4Args*>(parameters[0]);
  std::string name = "?";
  for (const auto& kernel : kernels)
    if (reinterpret_cast<void*>(kernel.second) == function) name = kernel.first;
  const int result = done(call("cuLaunchKernel", name, gx, gy, gz, bx, by, bz, shared, stream, extra == nullptr, current.size()));
  if (result) return result;
  block_size = bx;
  for (block_index.x = 0; block_index.x < gx; block_index.x++)
    for (thread_in_block.x = 0; thread_in_block.x < bx; thread_in_block.x++) reinterpret_cast<Kernel>(function)(args);
  return 0;
}
}
