// The vector width of the CPU loops: the widest that the processor supports, or an explicitly
// selected one (tests run all of them).
#pragma once
#include <string>

enum class Width { baseline, avx2, avx512, avx512_bf16 };

Width cpu_width();
// Selects the widest supported vector width up to `limit` ("": no limit) and returns its name.
std::string choose_cpu_width(const std::string& limit);
