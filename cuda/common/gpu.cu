// All CUDA kernels as one module; the file that NVRTC compiles.
#include "wkv4/wkv4.cu"
#include "wkv6/wkv6.cu"
#include "wkv7/wkv7.cu"
#include "elementwise/fused.cu"
#include "elementwise/time_mix.cu"
#include "quant/quant.cu"
