// The CPU loops for AVX-512 (Intel servers since 2017, AMD since 2022).
#ifdef __x86_64__
#pragma GCC target("arch=skylake-avx512")
#define WKV_BYTES 64
#define LOOPS(operations) operations##_loops_avx512
#include "wkv4/wkv4_cpu_loops.h"
#include "wkv6/wkv6_cpu_loops.h"
#include "wkv7/wkv7_cpu_loops.h"
#include "elementwise/fused_cpu_loops.h"
#endif
