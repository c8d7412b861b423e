// The fused operations' loops, as wkv4_cpu_avx512.cpp.
#ifdef __x86_64__
#pragma GCC target("arch=skylake-avx512")
#define WKV_BYTES 64
#define WKV_NAME "avx512"
#define FUSED_LOOPS fused_loops_avx512
#include "fused_cpu_loops.h"
#endif
