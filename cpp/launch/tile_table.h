// Every tile the kernel is built for, and why it exists.
#pragma once

#include "../kernel/tile_config.h"

namespace jax_marlin {

// Rows with the same tile_m stand together, the narrow one first.
constexpr TileConfig kTileTable[] = {
    // Up to 8 rows: two warpgroups split K, 8 packed tiles in flight a warp, three blocks an SM.
    {.tile_m = 8, .n_tiles = 1, .frags_n = 1, .depth = 8, .chunk = 8, .stages = 3, .min_blocks = 3},
    // Short K leaves the second warpgroup little to do: both take columns instead.
    {.tile_m = 8, .n_tiles = 2, .frags_n = 1, .depth = 8, .chunk = 4, .stages = 5, .min_blocks = 3},
    // 16 rows: two column tiles to each row of x, two blocks an SM.
    {.tile_m = 16,
     .n_tiles = 2,
     .frags_n = 1,
     .depth = 8,
     .chunk = 4,
     .stages = 5,
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
    // Large weights fill the GPU with wider blocks, which read x half as often.
    {.tile_m = 64,
     .n_tiles = 4,
     .frags_n = 2,
     .depth = 4,
     .chunk = 2,
     .stages = 3,
     .min_blocks = 1},
};
constexpr int kNumTiles = sizeof(kTileTable) / sizeof(kTileTable[0]);

}  // namespace jax_marlin
