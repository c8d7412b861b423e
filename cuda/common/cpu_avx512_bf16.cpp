// The CPU loops for AVX-512 with bf16 conversion (Intel since 2020, AMD since 2022). Needs GCC 10;
// with an older GCC, cpu_width.cpp does not select it.
#ifdef __x86_64__
#if __GNUC__ >= 10
#pragma GCC target("arch=skylake-avx512", "avx512bf16")
#define WKV_CONVERTS_BF16
#else
#pragma GCC target("arch=skylake-avx512")
#endif
#define WKV_BYTES 64
#define LOOPS(operations) operations##_loops_avx512_bf16
#include "wkv4/wkv4_cpu_loops.h"
#include "wkv6/wkv6_cpu_loops.h"
#include "wkv7/wkv7_cpu_loops.h"
#include "elementwise/fused_cpu_loops.h"
#endif
