// The CUDA unit: all kernels, in one module. NVRTC compiles this file.
#include "wkv4.cu"
#include "fused.cu"
