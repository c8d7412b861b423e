// The CUDA unit: all kernels, in one module. NVRTC compiles this file.
#include "wkv4/wkv4.cu"
#include "elementwise/fused.cu"
