// The fused operations' loops, as wkv4_cpu_baseline.cpp.
#define WKV_BYTES 16
#define WKV_NAME "baseline"
#define FUSED_LOOPS fused_loops_baseline
#include "fused_cpu_loops.h"
