// Whether a problem is for the skinny kernel, and how its blocks cut it: pure functions of sizes.
#pragma once

#include "../../kernel/params.h"
#include "../select_tile.h"

namespace jax_marlin {

struct SkinnyPlan {
  SkinnyCut cut;
  int clusters;  // of cut.parts blocks
  int64_t shared_bytes;  // of a block
  int warp_tiles;  // packed K tiles of the busiest warp
};

SkinnyPlan cut_skinny(const SkinnyTile& tile, int rows, int k_tiles, int n, int sm_count);

bool prefers_skinny(const GemmProblem& problem, const DeviceLimits& device);
TileChoice select_skinny(const GemmProblem& problem);

}  // namespace jax_marlin
