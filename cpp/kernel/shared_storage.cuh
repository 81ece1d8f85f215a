// What lives in shared memory; its size is sizeof(SharedStorage<Config>), nowhere recomputed.
#pragma once

#include "kernel_config.cuh"

namespace jax_marlin {

// Sums of each warp of K, and where their rows go: what the epilogue reads.
template <class Config>
struct TileSums {
  float of[Config::kWarpsK][Config::kTileM][Config::kPartialPitch];
};

template <class Config>
struct SharedStorage {
  using Element = typename Config::Element;
  static constexpr int kHalves = 2 * Config::kChunk;
  static constexpr bool kStored = Config::kStoredZeroPoints;

  // Stages of the K loop; the partial sums of the warps take their place after it.
  struct Stages {
    alignas(16) Element x[Config::kStages][Config::kWarpsK][Config::kXRows][Config::kXPitch];
    alignas(16) Element scales[Config::kStages][Config::kWarpsK][kHalves][Config::kColumns];
    alignas(16) Element zero_points[kStored ? Config::kStages : 1][kStored ? Config::kWarpsK : 1]
                                   [kStored ? kHalves : 1][kStored ? Config::kColumns : 8];
  };
  int source_row[Config::kTileM];  // row of x; -1 for padding
  int out_row[Config::kTileM];     // row of out; -1 for padding
  bool is_last;                    // this block arrived last at its output tile
  int route_expert[Config::kSumsRoutes ? Config::kWarpsK : 1];  // of each warp of K; -1 for none
  uint64_t arrived;  // barrier of resident operands, which begin in place of stages
  union {
    Stages stages;
    TileSums<Config> sums;
  };
};

}  // namespace jax_marlin
