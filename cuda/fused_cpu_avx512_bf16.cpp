// The fused operations' loops, as wkv4_cpu_avx512_bf16.cpp.
#ifdef __x86_64__
#if __GNUC__ >= 10
#pragma GCC target("arch=skylake-avx512", "avx512bf16")
#define WKV_CONVERTS_BF16
#else
#pragma GCC target("arch=skylake-avx512")
#endif
#define WKV_BYTES 64
#define WKV_NAME "avx512_bf16"
#define FUSED_LOOPS fused_loops_avx512_bf16
#include "fused_cpu_loops.h"
#endif
