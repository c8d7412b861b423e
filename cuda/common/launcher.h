// Starts the CUDA unit's kernels through NVIDIA's driver, which is looked for when it is first needed: a machine without one can load
// the library that this is part of.
#pragma once
#include <cstdint>
#include <string>

namespace launcher {

// Load a cubin or PTX file for a device, once; later calls for the same device do nothing.
// Throws std::runtime_error: no driver, a file that cannot be read, or what the driver says, with a remedy where there is one.
void load(int64_t device, const std::string& path);

// Run a kernel in `blocks` blocks of `threads` on a stream of the device, in its primary context (torch's), whichever thread calls; `args` is
// what the kernel is called with. The caller's context is current again afterwards. Returns at once, as launches do. Throws std::runtime_error.
void launch(int64_t device, void* stream, const std::string& kernel, int64_t blocks, int threads, const void* args);

}  // namespace launcher
