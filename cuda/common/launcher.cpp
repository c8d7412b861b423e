// Loads libcuda on first use and one module per device, and launches in the primary context of the
// device.
#include "common/launcher.h"

#include <dlfcn.h>

#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

namespace launcher {
namespace {

// The part of the CUDA driver API that is used, stable since CUDA 7.0. Declared here, so that
// building needs no CUDA header.
using Result = int;
using Context = void*;
using Module = void*;
using Function = void*;

template <class F> void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function)
    throw std::runtime_error(std::string("the NVIDIA driver has no ") + name + ": it predates CUDA 7.0; update it");
}

struct Driver {
  Result (*init)(unsigned flags);
  Result (*error_name)(Result, const char** name);
  Result (*error_string)(Result, const char** text);
  Result (*device_get)(int* device, int ordinal);
  Result (*retain)(Context*, int device);
  Result (*push)(Context);
  Result (*pop)(Context*);
  Result (*load_data)(Module*, const void* image);
  Result (*get_function)(Function*, Module, const char* name);
  Result (*launch)(Function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library)
      throw std::runtime_error(std::string("no NVIDIA driver found (") + dlerror() +
                               "); install one, or in a container use the NVIDIA Container Toolkit");
    find(library, "cuInit", init);
    find(library, "cuGetErrorName", error_name);
    find(library, "cuGetErrorString", error_string);
    find(library, "cuDeviceGet", device_get);
    find(library, "cuDevicePrimaryCtxRetain", retain);
    find(library, "cuCtxPushCurrent_v2", push);
    find(library, "cuCtxPopCurrent_v2", pop);
    find(library, "cuModuleLoadData", load_data);
    find(library, "cuModuleGetFunction", get_function);
    find(library, "cuLaunchKernel", launch);
    check(init(0), "cuInit");
  }

  void check(Result result, const std::string& what) const {
    if (result == 0) return;
    const char *name = nullptr, *text = nullptr;
    error_name(result, &name);
    error_string(result, &text);
    std::string message =
        what + ": " + (name ? name : "error " + std::to_string(result)) + (text ? std::string(" (") + text + ")" : "");
    if (result == 209)
      message +=
          ". There are no kernels for this GPU: run make kernels, or use the other stack (make venv STACK=modern)";
    if (result == 218 || result == 222)
      message += ". The driver is too old for these kernels: update it, or use the default stack (CUDA 11.7)";
    if (result == 700)
      message +=
          ". An earlier kernel of this process failed; CUDA_LAUNCH_BLOCKING=1 shows which. With RWKV-5 to 7, "
          "RWKV_FUSED=0 replaces the newest ones by operations of torch";
    throw std::runtime_error(message);
  }
};

const Driver& driver() {
  static const Driver instance;  // retried on the next call if the constructor throws
  return instance;
}

struct ScopedContext {  // pushes a context, and pops it when destroyed
  explicit ScopedContext(Context context) { driver().check(driver().push(context), "cuCtxPushCurrent"); }
  ~ScopedContext() { Context popped; driver().pop(&popped); }
};

struct Device {
  Context context;
  Module module;
  std::map<std::string, Function> kernels;
};
std::map<int64_t, Device> devices;
std::mutex mutex;

}  // namespace

void load(int64_t device, const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (devices.count(device)) return;
  std::ifstream file(path, std::ios::binary);
  std::stringstream image;
  if (!file || !(image << file.rdbuf())) throw std::runtime_error(path + " cannot be read; run: make kernels");
  Device loaded;
  int ordinal;
  driver().check(driver().device_get(&ordinal, int(device)), "cuDeviceGet");
  driver().check(driver().retain(&loaded.context, ordinal), "cuDevicePrimaryCtxRetain");
  const ScopedContext current(loaded.context);
  driver().check(driver().load_data(&loaded.module, image.str().c_str()),
                 "cuModuleLoadData " + path);  // PTX must be null-terminated
  devices[device] = loaded;
}

void launch(int64_t device, void* stream, const std::string& kernel, int64_t blocks, int threads, const void* args) {
  Context context;
  Function function;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = devices.find(device);
    if (found == devices.end()) throw std::runtime_error("no kernels loaded for device " + std::to_string(device));
    context = found->second.context;
    Function& known = found->second.kernels[kernel];
    if (!known) {
      const ScopedContext current(context);
      driver().check(driver().get_function(&known, found->second.module, kernel.c_str()),
                     "cuModuleGetFunction " + kernel);
    }
    function = known;
  }
  if (blocks > 0x7fffffff)
    throw std::runtime_error(kernel + ": " + std::to_string(blocks) +
                             " blocks exceed the CUDA limit of 2147483647; use a smaller batch");
  void* parameters[] = {const_cast<void*>(args)};
  const ScopedContext current(context);
  driver().check(
      driver().launch(function, unsigned(blocks), 1, 1, unsigned(threads), 1, 1, 0, stream, parameters, nullptr),
      "cuLaunchKernel " + kernel);
}

}  // namespace launcher
