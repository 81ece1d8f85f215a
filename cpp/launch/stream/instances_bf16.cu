// The streaming kernel for bfloat16 activations, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel stream_kernel_bf16(int bits, int tile, bool stored_zero_points) {
  return find_stream_kernel<__nv_bfloat16>(bits, tile, stored_zero_points);
}

}  // namespace jax_marlin
