// How a thread block of the skinny kernel cuts its work. Plain C++, shared by host and device.
#pragma once

#include <cstdint>

#include "tile_config.h"

namespace jax_marlin {

constexpr int kSkinnyColumns = 2 * kFragment;  // of a piece
constexpr int kSkinnyMaxParts = 4;  // of K, in the blocks of a cluster

// 4 floats of padding: the rows 2c of a quarter of a warp lie in different banks.
constexpr int kSkinnySumPitch = kSkinnyColumns + 4;

// In front of x: barriers of its slices, one a warp at most.
constexpr int kSkinnyBarrierBytes = 16 * sizeof(uint64_t);

// A multiprocessor has one block: warps times what each has on its way is what memory needs to stay
// busy, and the registers that a warp needs grow with the rows.
struct SkinnyTile {
  int rows;   // of x, at most
  int warps;  // of a block
  int depth;  // packed K tiles of a warp on their way

  constexpr int threads() const { return 32 * warps; }
};

// A piece is all rows by kSkinnyColumns columns over all of K, of which each warp of a team takes a
// slice. Blocks of a cluster may share K, and the pieces of their teams: each reads its part of x,
// and adds up the sums of some of the rows.
struct SkinnyCut {
  int parts;  // blocks of a cluster, which have a part of K each
  int row_shift;  // a block adds up 2^row_shift rows
  int k_shift;  // 2^k_shift warps of each part are a team
  int slices;  // of K, in all parts, that are not empty
  int slice_tiles;  // packed K tiles of a slice, at most
  int pieces;  // of a team, at least
  int more;  // teams, the first, that have one more
  int x_pitch;  // of a row of a slice of x in shared memory, in elements
  int sums_at;  // in shared memory, behind x, in bytes
  uint32_t groups_per_half;  // kHalf / group_size in units of 2^-31, rounded up; 0: a single group
};

}  // namespace jax_marlin
