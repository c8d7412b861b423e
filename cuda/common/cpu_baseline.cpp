// The CPU loops for the baseline instruction set of the architecture.
#define WKV_BYTES 16
#define LOOPS(operations) operations##_loops_baseline
#include "wkv4/wkv4_cpu_loops.h"
#include "wkv6/wkv6_cpu_loops.h"
#include "wkv7/wkv7_cpu_loops.h"
#include "elementwise/fused_cpu_loops.h"
