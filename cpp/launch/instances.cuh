// Instantiates the kernel for every tile of the table; each instances_*.cu does so for one format,
// so that the formats compile in parallel.
#pragma once

#include <cstddef>
#include <utility>

#include "../kernel/marlin_gemm.cuh"
#include "instances.h"
#include "tile_table.h"

namespace jax_marlin {

constexpr int kSharedLimit = 99 * 1024;  // of one block on sm_86, sm_89 and sm_120, the smallest

template <class Config>
GemmKernel gemm_kernel() {
  static_assert(sizeof(SharedStorage<Config>) <= kSharedLimit, "fits every GPU from sm_80 on");
  GemmKernel kernel = {marlin_gemm<Config>, Config::kThreads,
                       static_cast<int>(sizeof(SharedStorage<Config>))};
  if constexpr (Config::kCanReside) {
    kernel.resident = marlin_gemm_resident<Config>;
    kernel.stages_at = static_cast<int>(offsetof(SharedStorage<Config>, stages));
  }
  return kernel;
}

// The instance for run-time `tile`: one comparison each.
template <class Element, int bits, ZeroPoints zero_points, int... tiles>
GemmKernel find_gemm_kernel(int tile, std::integer_sequence<int, tiles...>) {
  GemmKernel kernel = {};
  ((tile == tiles
        ? void(kernel = gemm_kernel<KernelConfig<Element, bits, zero_points, tile_at(tiles)>>())
        : void()),
   ...);
  return kernel;
}

template <class Element, int bits>
GemmKernel find_gemm_kernel(int tile, bool stored_zero_points) {
  constexpr std::make_integer_sequence<int, kNumInstances> kTiles;
  return stored_zero_points ? find_gemm_kernel<Element, bits, ZeroPoints::kStored>(tile, kTiles)
                            : find_gemm_kernel<Element, bits, ZeroPoints::kSymmetric>(tile, kTiles);
}

}  // namespace jax_marlin
