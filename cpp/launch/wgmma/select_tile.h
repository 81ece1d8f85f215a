// Whether a problem is for the wgmma kernel, and which tile of its table serves it.
#pragma once

#include "../select_tile.h"

namespace jax_marlin {

// More rows to a tile than mma.sync serves well. The device must have wgmma, too: launch.h.
bool prefers_wgmma(const GemmProblem& problem);

struct WgmmaTileChoice {
  int tile;            // row of kWgmmaTable
  int sub_blocks;      // row blocks of one routing block; 1 when dense
  int64_t row_blocks;  // an upper bound when routed
  int n_blocks;
  int split_k;         // blocks of the cluster that shares one output tile; no scratch
};

WgmmaTileChoice select_wgmma_tile(const GemmProblem& problem, int sm_count);

}  // namespace jax_marlin
