// Every tile the kernel is built for, and why it exists.
#pragma once

#include "../kernel/tile_config.h"

namespace jax_marlin {

// Rows with the same tile_m stand together, the narrowest first.
constexpr TileConfig kTileTable[] = {
    // Up to 8 rows. Four blocks an SM with 4 packed tiles in flight a warp stream better than three
    // with 8. The wider a block, the fewer times tables and x are fetched; the narrower, the finer
    // the work divides over the SMs and the more warps share its K.
    {.tile_m = 8,
     .fragments = 2,
     .frags_n = 1,
     .depth = 4,
     .chunk = 4,
     .stages = 2,
     .min_blocks = 4},
    {.tile_m = 8,
     .fragments = 4,
     .frags_n = 1,
     .depth = 4,
     .chunk = 4,
     .stages = 4,
     .min_blocks = 4},
    {.tile_m = 8,
     .fragments = 8,
     .frags_n = 1,
     .depth = 4,
     .chunk = 4,
     .stages = 3,
     .min_blocks = 4},
    // Long K: a block lives long enough for a deeper ring.
    {.tile_m = 8,
     .fragments = 8,
     .frags_n = 1,
     .depth = 8,
     .chunk = 8,
     .stages = 4,
     .min_blocks = 3},
    // 16 rows; the narrow one for weights whose blocks all run at once.
    {.tile_m = 16,
     .fragments = 2,
     .frags_n = 1,
     .depth = 8,
     .chunk = 2,
     .stages = 5,
     .min_blocks = 1},
    {.tile_m = 16,
     .fragments = 4,
     .frags_n = 1,
     .depth = 8,
     .chunk = 4,
     .stages = 4,
     .min_blocks = 2},
    {.tile_m = 16,
     .fragments = 8,
     .frags_n = 2,
     .depth = 4,
     .chunk = 4,
     .stages = 3,
     .min_blocks = 2},
    // 32 and 64 rows: x is read from shared memory more than weights are from memory, so a warp
    // takes two column fragments to each token fragment, and a block two column tiles to each row
    // of x.
    {.tile_m = 32,
     .fragments = 8,
     .frags_n = 2,
     .depth = 4,
     .chunk = 2,
     .stages = 4,
     .min_blocks = 2},
    {.tile_m = 64,
     .fragments = 8,
     .frags_n = 2,
     .depth = 2,
     .chunk = 2,
     .stages = 2,
     .min_blocks = 2},
    // Large weights fill the GPU with wider blocks, which read x half as often.
    {.tile_m = 64,
     .fragments = 16,
     .frags_n = 2,
     .depth = 4,
     .chunk = 2,
     .stages = 3,
     .min_blocks = 1},
};
constexpr int kNumTiles = sizeof(kTileTable) / sizeof(kTileTable[0]);

// The sum over a token's routes, which is the second half of a layer. As narrow as a fragment, so
// that few columns still reach every multiprocessor; so deep that all 768 of Qwen3's K are in
// flight before x is there, in what two blocks of gate_up leave of the registers.
constexpr TileConfig kRoutesTile = {.tile_m = 8,
                                    .fragments = 1,
                                    .frags_n = 1,
                                    .depth = 12,
                                    .chunk = 3,
                                    .stages = 8,
                                    .min_blocks = 2,
                                    .sums_routes = true};
constexpr int kRoutesTileIndex = kNumTiles;  // in place of a row of the table

// x W^T, for gradients. A warp takes a whole packed tile where rows are few, so that its loads are
// whole runs; half of one where sums take the registers.
constexpr TileConfig kTransposedTable[] = {
    {.tile_m = 8,
     .fragments = 4,
     .frags_n = 4,
     .depth = 2,
     .chunk = 2,
     .stages = 2,
     .min_blocks = 3,
     .transposed = true},
    {.tile_m = 16,
     .fragments = 4,
     .frags_n = 4,
     .depth = 2,
     .chunk = 2,
     .stages = 2,
     .min_blocks = 2,
     .transposed = true},
    {.tile_m = 32,
     .fragments = 8,
     .frags_n = 2,
     .depth = 2,
     .chunk = 2,
     .stages = 3,
     .min_blocks = 2,
     .transposed = true},
    {.tile_m = 64,
     .fragments = 16,
     .frags_n = 2,
     .depth = 2,
     .chunk = 2,
     .stages = 3,
     .min_blocks = 1,
     .transposed = true},
};
constexpr int kNumTransposedTiles = sizeof(kTransposedTable) / sizeof(kTransposedTable[0]);
constexpr int kFirstTransposed = kRoutesTileIndex + 1;
constexpr int kNumInstances = kFirstTransposed + kNumTransposedTiles;

// TileChoice::tile counts them all.
constexpr const TileConfig& tile_at(int index) {
  return index < kNumTiles           ? kTileTable[index]
         : index == kRoutesTileIndex ? kRoutesTile
                                     : kTransposedTable[index - kFirstTransposed];
}

}  // namespace jax_marlin
