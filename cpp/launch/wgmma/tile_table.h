// Every tile the wgmma kernel is built for, and what a packed K tile costs it.
#pragma once

#include "../../kernel/wgmma_tile.h"

namespace jax_marlin {

// Clocks of one block, measured on an H100 with bfloat16 and 4 bits; select_tile.cc compares them.
struct WgmmaTileRow {
  WgmmaTile tile;
  int alone;  // a packed K tile, when the block has the SM to itself
  int full;   // the same with min_blocks of them on the SM
  int fixed;  // the rest of a piece of work: routing tables, first stages, stores
};

constexpr WgmmaTileRow kWgmmaTable[] = {
    // Few rows: weights stream at the speed of memory, two or three blocks an SM hide the rest.
    {{.tile_m = 32, .groups = 1, .group_tiles = 1, .stage_tiles = 2, .batch = 4, .min_blocks = 3,
      .copy_groups = 1}, 265, 600, 4000},
    {{.tile_m = 32, .groups = 2, .group_tiles = 1, .stage_tiles = 2, .batch = 4, .min_blocks = 2,
      .copy_groups = 1}, 400, 750, 4000},
    {{.tile_m = 64, .groups = 2, .group_tiles = 1, .stage_tiles = 1, .batch = 2, .min_blocks = 2,
      .copy_groups = 1}, 620, 850, 5000},
    // Twice the columns read x half as often.
    {{.tile_m = 64, .groups = 2, .group_tiles = 2, .stage_tiles = 1, .batch = 1, .min_blocks = 1,
      .copy_groups = 1}, 960, 960, 7000},
    // Many rows: the tensor cores are the limit; the narrow tile for what fills no GPU otherwise.
    {{.tile_m = 128, .groups = 2, .group_tiles = 1, .stage_tiles = 1, .batch = 2, .min_blocks = 1,
      .copy_groups = 2}, 860, 860, 7000},
    {{.tile_m = 128, .groups = 2, .group_tiles = 2, .stage_tiles = 1, .batch = 1, .min_blocks = 1,
      .copy_groups = 1}, 1380, 1380, 10000},
};
constexpr int kNumWgmmaTiles = sizeof(kWgmmaTable) / sizeof(kWgmmaTable[0]);

}  // namespace jax_marlin
