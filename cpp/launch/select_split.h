// How many blocks share the K of one output tile: a pure function of static sizes.
#pragma once

#include "select_tile.h"

namespace jax_marlin {

// At least as many multiprocessors as any GPU has: with the tile table it bounds the scratch.
constexpr int kMaxSmCount = 216;
constexpr int kMaxSplit = 8;  // blocks of a portable cluster

// Of a choice whose tile and blocks are known.
int select_split(const GemmProblem& problem, const TileChoice& choice, const DeviceLimits& device);

}  // namespace jax_marlin
