// Arguments of the kernels that dequantise a frozen matrix of N elements, row by row. Compiled by
// NVRTC and by the host compiler.
#pragma once

#define QUANT_BLOCK 64     // elements that share a scale in NF4
#define QUANT_GROUP 256    // scales that are quantised together
#define QUANT_THREADS 128  // per block
#define QUANT_WIDTH 8      // elements of a GPU thread

struct QuantNF4 {
  long long N;
  const unsigned char* packed;  // [(N + 1) / 2], the first of two elements in the upper half
  const float* levels;          // [16]
  const unsigned char* absmax;  // [blocks]
  const float* absmax_levels;   // [256]
  const float* group_absmax;    // [groups]
  const float* offset;          // [1]
  void* y;                      // [N]
};

struct QuantInt8 {
  long long N, columns;
  const signed char* q;  // [N]
  const float* absmax;   // [N / columns]
  void* y;               // [N]
};
