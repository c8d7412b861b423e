// Which vector unit the CPU loops use: the widest that the processor has, or one asked for (tests run them all).
#pragma once
#include <string>

enum class Width { baseline, avx2, avx512, avx512_bf16 };

Width cpu_width();
std::string choose_cpu_width(const std::string& most);  // the widest that is not wider than this ("": no limit); its name
