// The skinny kernel for bfloat16 activations, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel skinny_kernel_bf16(int bits, int tile, bool stored_zero_points) {
  return bits == 4 ? find_skinny_kernel<__nv_bfloat16, 4>(tile, stored_zero_points)
                   : find_skinny_kernel<__nv_bfloat16, 8>(tile, stored_zero_points);
}

}  // namespace jax_marlin
