// Instantiates the streaming kernel for every format of an element type and every tile of its
// table.
#pragma once

#include <utility>

#include "../../kernel/stream_gemm.cuh"
#include "instances.h"
#include "tile_table.h"

namespace jax_marlin {

template <class Element, int bits, ZeroPoints zero_points, int... tiles>
GemmKernel find_stream_kernel(int tile, std::integer_sequence<int, tiles...>) {
  GemmKernel kernel = {};
  const auto use = [&]<class Config>(Config) {
    kernel = {stream_gemm<Config>, kStreamThreads, static_cast<int>(sizeof(StreamStorage<Config>))};
  };
  ((tile == tiles ? use(StreamConfig<Element, bits, zero_points, kStreamTable[tiles]>()) : void()),
   ...);
  return kernel;
}

template <class Element>
GemmKernel find_stream_kernel(int bits, int tile, bool stored_zero_points) {
  constexpr auto kStored = ZeroPoints::kStored, kSymmetric = ZeroPoints::kSymmetric;
  constexpr std::make_integer_sequence<int, kNumStreamTiles> kTiles;
  if (bits == 4) {
    return stored_zero_points ? find_stream_kernel<Element, 4, kStored>(tile, kTiles)
                              : find_stream_kernel<Element, 4, kSymmetric>(tile, kTiles);
  }
  return stored_zero_points ? find_stream_kernel<Element, 8, kStored>(tile, kTiles)
                            : find_stream_kernel<Element, 8, kSymmetric>(tile, kTiles);
}

}  // namespace jax_marlin
