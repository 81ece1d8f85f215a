// Instantiates the kernel for every tile of the table; each instances_*.cu does so for one format,
// so that the formats compile in parallel.
#pragma once

#include <utility>

#include "../kernel/marlin_gemm.cuh"
#include "instances.h"
#include "tile_table.h"

namespace jax_marlin {

constexpr int kSharedLimit = 99 * 1024;  // of one block on sm_86, sm_89 and sm_120, the smallest

template <class Config>
GemmKernel gemm_kernel() {
  static_assert(sizeof(SharedStorage<Config>) <= kSharedLimit, "fits every GPU from sm_80 on");
  return {marlin_gemm<Config>, static_cast<int>(sizeof(SharedStorage<Config>))};
}

template <class Element, int bits, int... tiles>
GemmKernel find_gemm_kernel(int tile, bool stored_zero_points,
                            std::integer_sequence<int, tiles...>) {
  GemmKernel kernel = {};
  ((tile == tiles
        ? void(kernel =
                   stored_zero_points
                       ? gemm_kernel<
                             KernelConfig<Element, bits, ZeroPoints::kStored, kTileTable[tiles]>>()
                       : gemm_kernel<KernelConfig<Element, bits, ZeroPoints::kSymmetric,
                                                  kTileTable[tiles]>>())
        : void()),
   ...);
  return kernel;
}

template <class Element, int bits>
GemmKernel find_gemm_kernel(int tile, bool stored_zero_points) {
  return find_gemm_kernel<Element, bits>(tile, stored_zero_points,
                                         std::make_integer_sequence<int, kNumTiles>());
}

}  // namespace jax_marlin
