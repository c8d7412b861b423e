// The WKV CPU loops with e^k from glibc's libmvec instead of the inlined polynomial, for
// bench/wkv.py.
#pragma GCC target("arch=skylake-avx512")
#define WKV_BYTES 64
#define LOOPS(operations) operations##_loops_library
#include "wkv4/wkv4_cpu.h"
extern const Wkv4Loops wkv4_loops_library;
#include "common/cpu_block.h"

extern "C" __m512 _ZGVeN16v_expf(__m512);
WKV_FN wkv_float library_exp(wkv_float x) { return (wkv_float)_ZGVeN16v_expf((__m512)x); }
#define wkv_exp_in_range library_exp
#include "wkv4/wkv4_cpu_loops.h"
