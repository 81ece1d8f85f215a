// A compiled skinny kernel, one for each (element, bits, zero points, tile).
#pragma once

#include "../instances.h"

namespace jax_marlin {

GemmKernel skinny_kernel_fp16(int bits, int tile, bool stored_zero_points);
GemmKernel skinny_kernel_bf16(int bits, int tile, bool stored_zero_points);

}  // namespace jax_marlin
