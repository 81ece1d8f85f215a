// The wgmma kernel for float16 activations and 8-bit weights, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel wgmma_kernel_fp16_w8(int tile, bool stored_zero_points) {
  return find_wgmma_kernel<__half, 8>(tile, stored_zero_points);
}

}  // namespace jax_marlin
