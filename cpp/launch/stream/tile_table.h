// Every tile the streaming kernel is built for.
#pragma once

#include "../../kernel/stream_tile.h"

namespace jax_marlin {

// {stage_tiles, min_blocks}
constexpr StreamTile kStreamTable[] = {
    // A stage costs the same few hundred clocks whatever it holds: long ones, of which a block has
    // two, on two blocks an SM.
    {8, 2},
    // K of 12 packed tiles, as Qwen3's experts have, is two of these, and one and a half of those.
    {6, 3},
};
constexpr int kNumStreamTiles = sizeof(kStreamTable) / sizeof(kStreamTable[0]);

}  // namespace jax_marlin
