// Detects the vector width once, when the library is loaded.
#include "common/cpu_width.h"

namespace {

Width widest(const std::string& limit) {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if __GNUC__ >= 10
  if (avx512 && __builtin_cpu_supports("avx512bf16") && (limit.empty() || limit == "avx512_bf16"))
    return Width::avx512_bf16;
#endif
  if (avx512 && limit != "avx2" && limit != "baseline") return Width::avx512;
  if (avx2 && limit != "baseline") return Width::avx2;
#endif
  return Width::baseline;
}

Width width = widest("");

}  // namespace

Width cpu_width() { return width; }

std::string choose_cpu_width(const std::string& limit) {
  width = widest(limit);
  return width == Width::avx512_bf16 ? "avx512_bf16"
         : width == Width::avx512    ? "avx512"
         : width == Width::avx2      ? "avx2"
                                     : "baseline";
}
