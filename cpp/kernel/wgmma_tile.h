// How a thread block of the wgmma kernel cuts its piece. Plain C++, shared by host and device.
#pragma once

#include "tile_config.h"

namespace jax_marlin {

// tile_m rows by 64 * groups * group_tiles columns. Some warpgroups copy, `groups` others multiply.
struct WgmmaTile {
  int tile_m;       // rows of x, a multiple of 16 that width_step divides
  int groups;       // warpgroups that multiply, each its own columns
  int group_tiles;  // packed column tiles of one of them
  int stage_tiles;  // packed K tiles of one stage
  int batch;        // k16 steps dequantized before they are issued together
  int min_blocks;   // blocks of one SM: they share registers and shared memory
  int copy_groups;  // warpgroups that copy: a thread issues a copy every 100 clocks or so
  // Rows are neighbours in x, and the copy engine brings them: too many for threads to gather. It
  // takes 16 clocks for each row that it is asked for alone, so that others it does not bring.
  bool in_boxes = false;

  constexpr int column_tiles() const { return groups * group_tiles; }
  constexpr int columns() const { return kTile * column_tiles(); }
  // Codes of 8 bits take twice the room, and registers.
  constexpr int stage_tiles_of(int bits) const {
    return bits == 8 && group_tiles * stage_tiles > 2 ? stage_tiles / 2 : stage_tiles;
  }
  // Gate and up of the same columns meet in one warpgroup: each a column tile of its own or, where
  // sums of one fill the registers, half of one (wgmma_gated_store.cuh).
  constexpr bool can_gate() const { return group_tiles == 2 || in_boxes; }
  // The last rows of an expert rarely fill a tile: narrower products spare the tensor cores, where
  // those are the limit, and x is copied in boxes of as many rows.
  constexpr int width_step() const {
    return tile_m <= 32 ? tile_m : tile_m % 48 == 0 ? tile_m / 3 : tile_m / 4;
  }
  constexpr int threads() const { return 128 * (groups + copy_groups); }
};

}  // namespace jax_marlin
