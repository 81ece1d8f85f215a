// How a thread block of the streaming kernel cuts its piece. Plain C++, shared by host and device.
#pragma once

#include "tile_config.h"

namespace jax_marlin {

// A piece is 8 rows by two column tiles, of which each warp that multiplies has a fragment: one of
// gate and one of up, where they meet. One warp more copies.
constexpr int kStreamRows = 8;
constexpr int kStreamColumnTiles = 2;
constexpr int kStreamColumns = kStreamColumnTiles * kTile;
constexpr int kStreamWarps = kTile / kFragment;
constexpr int kStreamThreads = 32 * (kStreamWarps + 1);

struct StreamTile {
  int stage_tiles;  // packed K tiles of one stage, of 4-bit codes
  int min_blocks;   // blocks of one SM: they share registers and shared memory

  constexpr int stage_tiles_of(int bits) const { return stage_tiles * 4 / bits; }
};

}  // namespace jax_marlin
