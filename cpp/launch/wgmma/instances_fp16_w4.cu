// The wgmma kernel for float16 activations and 4-bit weights, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel wgmma_kernel_fp16_w4(int tile, bool stored_zero_points) {
  return find_wgmma_kernel<__half, 4>(tile, stored_zero_points);
}

}  // namespace jax_marlin
