// All CUDA kernels as one module; the file that NVRTC compiles.
#include "wkv4/wkv4.cu"
#include "wkv6/wkv6.cu"
#include "wkv7/wkv7.cu"
#include "wkv7/wkv7_chunk.cu"
#include "wkv7/wkv7_chunk_gradient.cu"
#include "elementwise/fused.cu"
#include "quant/quant.cu"
#include "optimizer/adamw.cu"
