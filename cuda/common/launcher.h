// Launches the CUDA kernels through the NVIDIA driver, which is loaded on first use: the library
// also loads on machines without one.
#pragma once
#include <cstdint>
#include <string>

namespace launcher {

// Loads a cubin or PTX file for a device; later calls for the same device do nothing. Throws
// std::runtime_error if there is no driver, the file cannot be read, or the driver reports an
// error.
void load(int64_t device, const std::string& path);

// Launches a kernel with `blocks` blocks of `threads` threads on a stream of the device, in its
// primary context (the one torch uses), from any thread. `args` points to the kernel argument.
// Asynchronous; the caller's current context is restored. Throws std::runtime_error.
void launch(int64_t device, void* stream, const std::string& kernel, int64_t blocks, int threads, const void* args);

}  // namespace launcher
