// The CPU unit's loops for what every processor of the architecture has.
#define WKV_BYTES 16
#define WKV_NAME "baseline"
#define WKV_LOOPS wkv4_loops_baseline
#include "wkv4_cpu_loops.h"
