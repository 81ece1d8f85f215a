// A compiled kernel and its shared memory, one for each (element, bits, zero points, tile).
#pragma once

#include "../kernel/params.h"

namespace jax_marlin {

struct GemmKernel {
  void (*function)(GemmParams);
  int threads, shared_bytes;
  void (*resident)(GemmParams);  // where shared memory holds all of x, which it does from
  int stages_at;                 // this place on
};

GemmKernel gemm_kernel_fp16_w4(int tile, bool stored_zero_points);
GemmKernel gemm_kernel_fp16_w8(int tile, bool stored_zero_points);
GemmKernel gemm_kernel_bf16_w4(int tile, bool stored_zero_points);
GemmKernel gemm_kernel_bf16_w8(int tile, bool stored_zero_points);

}  // namespace jax_marlin
