// The streaming kernel for float16 activations, at every tile.

#include "instances.cuh"

namespace jax_marlin {

GemmKernel stream_kernel_fp16(int bits, int tile, bool stored_zero_points) {
  return find_stream_kernel<__half>(bits, tile, stored_zero_points);
}

}  // namespace jax_marlin
