// The wgmma kernel for bfloat16 activations and 8-bit weights, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel wgmma_kernel_bf16_w8(int tile, bool stored_zero_points) {
  return find_wgmma_kernel<__nv_bfloat16, 8>(tile, stored_zero_points);
}

}  // namespace jax_marlin
