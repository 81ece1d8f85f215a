// The instance for a choice's format and tile.

#include "launch.h"

#include "instances.h"
#include "tile_table.h"

namespace jax_marlin {

StreamKernel stream_kernel(const GemmLaunch& gemm) {
  const auto find = gemm.element == ElementType::kFloat16 ? stream_kernel_fp16 : stream_kernel_bf16;
  const int tile = gemm.choice.tile;
  return {find(gemm.bits, tile, gemm.params.zero_points != nullptr), kStreamTable[tile].min_blocks};
}

}  // namespace jax_marlin
