// Teams of warps, the pieces of each, and which problems they suit.

#include "cut.h"

#include <algorithm>
#include <cmath>

#include "tile_table.h"

namespace jax_marlin {
namespace {

// The first that takes all rows.
int fitting_tile(const GemmProblem& problem) {
  int tile = 0;
  while (kSkinnyTable[tile].rows < problem.rows) ++tile;
  return tile;
}

}  // namespace

SkinnyPlan cut_skinny(const SkinnyTile& tile, int rows, int k_tiles, int n, int sm_count) {
  SkinnyPlan plan = {};
  SkinnyCut& cut = plan.cut;
  // As many warps share a K as have two packed tiles of it each, a turn of their rings.
  while (2 << cut.k_shift <= tile.warps && 4 << cut.k_shift <= k_tiles) ++cut.k_shift;
  cut.slice_tiles = static_cast<int>(ceil_div(k_tiles, 1 << cut.k_shift));
  cut.slices = static_cast<int>(ceil_div(k_tiles, cut.slice_tiles));
  const int teams_of_block = tile.warps >> cut.k_shift;
  const auto pieces = static_cast<int>(ceil_div(n, kSkinnyColumns));
  plan.blocks = std::min(sm_count, static_cast<int>(ceil_div(pieces, teams_of_block)));
  cut.pieces = pieces / (plan.blocks * teams_of_block);
  cut.more = pieces % (plan.blocks * teams_of_block);
  // 16 bytes of padding a row turn the row pitch into 4 banks modulo 32: ldmatrix has no conflict.
  cut.x_pitch = cut.slice_tiles * kTile + 8;
  cut.x_bytes = tile.warps * rows * cut.x_pitch * 2;
  const int most = cut.pieces + (cut.more > 0 ? 1 : 0);
  plan.shared_bytes = cut.x_bytes + most * tile.warps * rows * kSkinnySumPitch * 4;
  return plan;
}

// Measured on an H200: fewer columns leave multiprocessors idle, and K is better cut between
// blocks; many weights are better streamed in bulk copies, ahead of the warps that multiply. More
// rows than 8 cost every block as much x as weights, which pays where all blocks end together.
bool prefers_skinny(const GemmProblem& problem, const DeviceLimits& device) {
  constexpr double kMinPieces = 0.45, kMaxTiles = 440;  // of an SM; of pieces, packed K tiles
  constexpr double kMaxUneven = 1.1;  // the busiest SM's pieces over the average's, of many rows
  if (!device.has_wgmma || problem.transposed || problem.moe_block_size > 0) return false;
  const int k_tiles = problem.k / kTile;
  if (problem.k % kTile != 0 || k_tiles < 1 || k_tiles >= kSkinnyMaxTiles) return false;
  if (problem.rows < 1 || problem.rows > kSkinnyTable[kNumSkinnyTiles - 1].rows) return false;
  const double pieces = static_cast<double>(ceil_div(problem.n, kSkinnyColumns)) / device.sm_count;
  if (pieces < kMinPieces || pieces * k_tiles > kMaxTiles) return false;
  const int tile = fitting_tile(problem);
  if (tile > 0 && std::ceil(pieces) > kMaxUneven * pieces) return false;
  const SkinnyPlan plan = cut_skinny(kSkinnyTable[tile], static_cast<int>(problem.rows), k_tiles,
                                     problem.n, device.sm_count);
  return plan.shared_bytes <= kSharedOfBlock;
}

TileChoice select_skinny(const GemmProblem& problem) {
  TileChoice choice = {};
  choice.kernel = Kernel::kSkinny;
  choice.tile = fitting_tile(problem);
  choice.row_blocks = choice.sub_blocks = choice.split_k = 1;
  choice.n_blocks = static_cast<int>(ceil_div(problem.n, kSkinnyColumns));
  return choice;
}

}  // namespace jax_marlin
