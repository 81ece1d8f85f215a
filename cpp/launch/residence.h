// Whether a block's shared memory holds all of its part of x: a pure function of static sizes.
#pragma once

#include "../kernel/params.h"
#include "../kernel/tile_config.h"
#include "select_tile.h"

namespace jax_marlin {

struct Residence {
  int rows;   // of x that a block holds over its part of K; 0: it keeps a ring
  int bytes;  // that they and their scales take
};

// fixed_bytes: what a block's shared memory holds besides.
Residence select_residence(const GemmParams& params, const TileChoice& choice,
                           const TileConfig& tile, int bits, int fixed_bytes,
                           const DeviceLimits& device);

}  // namespace jax_marlin
