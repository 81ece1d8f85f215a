// The wgmma kernel for bfloat16 activations and 4-bit weights, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel wgmma_kernel_bf16_w4(int tile, bool stored_zero_points) {
  return find_wgmma_kernel<__nv_bfloat16, 4>(tile, stored_zero_points);
}

}  // namespace jax_marlin
