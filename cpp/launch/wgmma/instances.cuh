// Instantiates the wgmma kernel for every tile of its table; each instances_*.cu does so for one
// format, so that the formats compile in parallel.
#pragma once

#include <utility>

#include "../../kernel/wgmma_gemm.cuh"
#include "instances.h"
#include "tile_table.h"

namespace jax_marlin {

template <class Config>
GemmKernel wgmma_kernel() {
  return {wgmma_gemm<Config>, Config::kThreads, static_cast<int>(sizeof(WgmmaStorage<Config>))};
}

template <class Element, int bits, int... tiles>
GemmKernel find_wgmma_kernel(int tile, bool stored, std::integer_sequence<int, tiles...>) {
  constexpr auto kStored = ZeroPoints::kStored, kSymmetric = ZeroPoints::kSymmetric;
  GemmKernel kernel = {};
  ((tile == tiles
        ? void(
              kernel =
                  stored
                      ? wgmma_kernel<WgmmaConfig<Element, bits, kStored, kWgmmaTable[tiles].tile>>()
                      : wgmma_kernel<
                            WgmmaConfig<Element, bits, kSymmetric, kWgmmaTable[tiles].tile>>())
        : void()),
   ...);
  return kernel;
}

template <class Element, int bits>
GemmKernel find_wgmma_kernel(int tile, bool stored_zero_points) {
  return find_wgmma_kernel<Element, bits>(tile, stored_zero_points,
                                          std::make_integer_sequence<int, kNumWgmmaTiles>());
}

}  // namespace jax_marlin
