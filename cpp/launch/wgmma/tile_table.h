// Every tile the wgmma kernel is built for, and what a packed K tile costs it.
#pragma once

#include "../../kernel/wgmma_tile.h"

namespace jax_marlin {

// Clocks of one block with bfloat16 and 4 bits; select_tile.cc compares them. Measured on an H100,
// `fixed` as what whole calls leave for 128 x 256, or set so that the tile chosen is the one whose
// calls were fastest on an H200.
struct WgmmaTileRow {
  WgmmaTile tile;
  int alone;  // a packed K tile, when the block has the SM to itself
  int full;   // the same with min_blocks of them on the SM
  int fixed;  // the rest of a piece of work: routing tables, first stages, stores
  // Of blocks of routed rows, over all of K: what it was made and measured for.
  bool of_blocks = false;
};

// tile: {tile_m, groups, group_tiles, stage_tiles, batch, min_blocks, copy_groups, in_boxes}
constexpr WgmmaTileRow kWgmmaTable[] = {
    // Few rows: what a batch waits for hardly depends on how much it multiplies, so the more k16
    // steps in one the better; two or three blocks an SM, where their stages fit, hide the rest.
    {{32, 1, 1, 2, 4, 3, 1}, 285, 600, 3000},
    {{32, 2, 1, 2, 4, 2, 1}, 390, 750, 3000},
    {{64, 2, 1, 4, 4, 1, 1}, 480, 480, 3500},
    // Two column tiles a warpgroup serve gated products. Where memory is the limit, three blocks of
    // one warpgroup stream better than two of two.
    {{16, 1, 2, 2, 2, 3, 1}, 500, 1000, 3000, true},
    {{32, 1, 2, 2, 2, 3, 1}, 550, 1100, 3000, true},
    // Twice the columns read x half as often. Stages of two K tiles: each costs the same few dozen
    // instructions, and on power that they take the clock of the whole GPU depends.
    {{64, 2, 2, 2, 2, 1, 1}, 750, 750, 3500},
    // Many rows: the tensor cores are the limit. The wider the tile the less it reads, but the
    // narrow ones leave fewer multiprocessors idle in the last wave.
    {{96, 2, 2, 2, 1, 1, 1}, 1090, 1090, 4500, true},
    {{128, 2, 1, 2, 2, 1, 1}, 680, 680, 3500},
    {{128, 3, 1, 1, 1, 1, 2}, 1000, 1000, 4000},
    {{128, 2, 2, 2, 1, 1, 1}, 1300, 1300, 4500},
    // About as many as registers hold the sums of: experts of about 128 rows, or 256, rarely have
    // more than one block of these, or two.
    {{144, 2, 2, 2, 1, 1, 1}, 1430, 1430, 4500, true},
    // Rows that are neighbours: products of twice the width, for which each weight is dequantized
    // half as often, and copies that take no threads.
    {{256, 2, 1, 1, 2, 1, 1, true}, 1160, 1160, 4500},
};
constexpr int kNumWgmmaTiles = sizeof(kWgmmaTable) / sizeof(kWgmmaTable[0]);

}  // namespace jax_marlin
