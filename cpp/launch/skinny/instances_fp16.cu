// The skinny kernel for float16 activations, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel skinny_kernel_fp16(int bits, int tile, bool stored_zero_points) {
  return bits == 4 ? find_skinny_kernel<__half, 4>(tile, stored_zero_points)
                   : find_skinny_kernel<__half, 8>(tile, stored_zero_points);
}

}  // namespace jax_marlin
