// The CPU loops for AVX2 with FMA (Intel since 2013, AMD since 2015).
#ifdef __x86_64__
#pragma GCC target("arch=haswell")
#define WKV_BYTES 32
#define LOOPS(operations) operations##_loops_avx2
#include "wkv4/wkv4_cpu_loops.h"
#include "wkv6/wkv6_cpu_loops.h"
#include "wkv7/wkv7_cpu_loops.h"
#include "elementwise/fused_cpu_loops.h"
#endif
