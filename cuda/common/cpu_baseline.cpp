// The CPU unit's loops for what every processor of the architecture has.
#define WKV_BYTES 16
#define LOOPS(operations) operations##_loops_baseline
#include "wkv4/wkv4_cpu_loops.h"
#include "wkv7/wkv7_cpu_loops.h"
#include "elementwise/fused_cpu_loops.h"
