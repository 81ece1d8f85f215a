// Whether a problem is for the streaming kernel, and which tile of its table serves it.
#pragma once

#include "../select_tile.h"

namespace jax_marlin {

// Few rows to a tile, and weights enough to keep every multiprocessor's blocks at work.
bool prefers_stream(const GemmProblem& problem, const DeviceLimits& device);

TileChoice select_stream_tile(const GemmProblem& problem, const DeviceLimits& device);

}  // namespace jax_marlin
