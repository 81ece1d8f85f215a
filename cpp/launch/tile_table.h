// Every tile the kernel is built for, and why it exists.
#pragma once

#include "../kernel/tile_config.h"

namespace jax_marlin {

constexpr TileConfig kTileTable[] = {
    // Up to 8 rows: two warpgroups split K, 8 packed tiles in flight a warp, three blocks an SM;
    // the x stages of 2048 of K are all requested before the first weight.
    {.tile_m = 8, .n_tiles = 1, .frags_n = 1, .depth = 8, .chunk = 4, .stages = 5, .min_blocks = 3},
    // 16 rows: the same cut; twice the x a stage leaves room for two blocks.
    {.tile_m = 16,
     .n_tiles = 1,
     .frags_n = 1,
     .depth = 8,
     .chunk = 4,
     .stages = 4,
     .min_blocks = 2},
    // 32 and 64 rows: x is read from shared memory more than weights are from memory, so a warp
    // takes
    // two column fragments to each token fragment, and a block two column tiles to each row of x.
    {.tile_m = 32,
     .n_tiles = 2,
     .frags_n = 2,
     .depth = 4,
     .chunk = 2,
     .stages = 4,
     .min_blocks = 2},
    {.tile_m = 64,
     .n_tiles = 2,
     .frags_n = 2,
     .depth = 4,
     .chunk = 1,
     .stages = 4,
     .min_blocks = 1},
};
constexpr int kNumTiles = sizeof(kTileTable) / sizeof(kTileTable[0]);

}  // namespace jax_marlin
