// Whether a problem is for the wgmma kernel, and which tile of its table serves it.
#pragma once

#include "../select_tile.h"

namespace jax_marlin {

// More rows to a tile than mma.sync serves well. The device must have wgmma, too: launch.h.
bool prefers_wgmma(const GemmProblem& problem, int sm_count);

TileChoice select_wgmma_tile(const GemmProblem& problem, int sm_count);

}  // namespace jax_marlin
