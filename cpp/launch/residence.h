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

// Blocks of a multiprocessor that x must leave room for, where blocks run in several waves: beyond
// two, one fewer than the registers allow. That costs less in warps than a ring in instructions.
int blocks_beside(const TileConfig& tile, int bits);

// Whether rows of this problem will stay, near enough, while the scales of a group are unknown.
bool may_reside(const GemmProblem& problem, const TileConfig& tile, int split_k,
                const DeviceLimits& device);

// fixed_bytes: what a block's shared memory holds besides.
Residence select_residence(const GemmParams& params, const TileChoice& choice,
                           const TileConfig& tile, int bits, int fixed_bytes,
                           const DeviceLimits& device);

}  // namespace jax_marlin
