// A compiled wgmma kernel and its shared memory, one for each (element, bits, zero points, tile).
#pragma once

#include "../instances.h"

namespace jax_marlin {

GemmKernel wgmma_kernel_fp16_w4(int tile, bool stored_zero_points);
GemmKernel wgmma_kernel_fp16_w8(int tile, bool stored_zero_points);
GemmKernel wgmma_kernel_bf16_w4(int tile, bool stored_zero_points);
GemmKernel wgmma_kernel_bf16_w8(int tile, bool stored_zero_points);

}  // namespace jax_marlin
