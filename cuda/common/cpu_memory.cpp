// Memory of tensors on CPUs such that a block fits again into the hole that one of its size has left.
//
// torch asks posix_memalign for blocks aligned to 64 bytes. glibc before 2.38 looks there for a hole of the size, the alignment and a header, which is
// more than the hole that it then leaves: a training step, which takes the same sizes again and again, found none of its own holes and grew by a third
// (LOG.md). malloc fits exactly, so here the alignment is part of the size.
#include "common/cpu_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/version.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr uintptr_t ALIGNMENT = 64;

void release(void* data) {
  if (!data) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  std::free(static_cast<void**>(data)[-1]);  // where the block began
}

struct Memory final : c10::Allocator {
#if TORCH_VERSION_MAJOR >= 2
  c10::DataPtr allocate(size_t bytes) override { return take(bytes); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
#else
  c10::DataPtr allocate(size_t bytes) const override { return take(bytes); }
#endif
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

 private:
  static c10::DataPtr take(size_t bytes) {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (!bytes) return {nullptr, cpu};
    void* block = bytes <= SIZE_MAX - ALIGNMENT ? std::malloc(bytes + ALIGNMENT) : nullptr;
    if (!block) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      TORCH_CHECK(false, "can't allocate memory: you tried to allocate ", bytes, " bytes");
    }
    // malloc aligns to 16, so at least 16 bytes lie before: room for a pointer.
    void* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block) + ALIGNMENT) & ~(ALIGNMENT - 1));
    static_cast<void**>(data)[-1] = block;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, cpu};
  }
};

}  // namespace

void use_cpu_memory() {
  static Memory memory;
  c10::SetCPUAllocator(&memory, 1);  // above torch's own. What was allocated before is freed as it was allocated.
}
