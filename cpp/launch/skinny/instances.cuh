// Instantiates the skinny kernel for every format of an element type and every tile of its table.
#pragma once

#include <utility>

#include "../../kernel/skinny_gemm.cuh"
#include "instances.h"
#include "tile_table.h"

namespace jax_marlin {

template <class Element, int bits, ZeroPoints zero_points, int... tiles>
GemmKernel find_skinny_kernel(int tile, std::integer_sequence<int, tiles...>) {
  GemmKernel kernel = {};  // its shared memory: by the cut
  const auto use = [&]<class Config>(Config) {
    kernel.function = skinny_gemm<Config>;
    kernel.threads = Config::kThreads;
  };
  ((tile == tiles ? use(SkinnyConfig<Element, bits, zero_points, kSkinnyTable[tiles]>()) : void()),
   ...);
  return kernel;
}

template <class Element, int bits>
GemmKernel find_skinny_kernel(int tile, bool stored_zero_points) {
  constexpr std::make_integer_sequence<int, kNumSkinnyTiles> kTiles;
  return stored_zero_points
             ? find_skinny_kernel<Element, bits, ZeroPoints::kStored>(tile, kTiles)
             : find_skinny_kernel<Element, bits, ZeroPoints::kSymmetric>(tile, kTiles);
}

}  // namespace jax_marlin
