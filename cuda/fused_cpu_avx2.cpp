// The fused operations' loops, as wkv4_cpu_avx2.cpp.
#ifdef __x86_64__
#pragma GCC target("arch=haswell")
#define WKV_BYTES 32
#define WKV_NAME "avx2"
#define FUSED_LOOPS fused_loops_avx2
#include "fused_cpu_loops.h"
#endif
