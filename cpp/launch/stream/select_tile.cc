// The tile whose blocks end soonest.

#include "select_tile.h"

#include <cmath>

#include "tile_table.h"

namespace jax_marlin {
namespace {

// Pieces of work that a call will have, as far as static sizes tell.
double expected_pieces(const GemmProblem& problem) {
  return expected_row_blocks(problem, kStreamRows) *
         static_cast<double>(ceil_div(problem.n, kStreamColumns));
}

// K tiles that a multiprocessor copies until its last block ends: each has as many pieces as any,
// and of each K with the last stage filled up.
double estimate(const GemmProblem& problem, const StreamTile& tile, int sm_count) {
  const int stage_tiles = tile.stage_tiles_of(problem.bits);
  const auto k_tiles =
      static_cast<double>(ceil_div(ceil_div(problem.k, kTile), stage_tiles) * stage_tiles);
  const double blocks = static_cast<double>(sm_count) * tile.min_blocks;
  return std::ceil(expected_pieces(problem) / blocks) * k_tiles * tile.min_blocks;
}

}  // namespace

// Measured on an H200. Blocks that stay spend some microseconds before their first product and
// after their last, which enough K for each multiprocessor hides, more where a piece is short; and
// far fewer pieces than multiprocessors are better cut finer.
bool prefers_stream(const GemmProblem& problem, const DeviceLimits& device) {
  constexpr double kMinPieces = 0.7, kMinTiles = 43, kMinTilesOfShortK = 70;  // of an SM
  constexpr int kShortK = 20;  // K tiles
  const bool copies = device.has_wgmma && problem.k % kTile == 0;  // bulk copies, of whole K tiles
  const bool routed = problem.moe_block_size > 0;  // else: the skinny kernel
  if (!copies || !routed || tile_rows(problem) > kStreamRows) return false;
  // Gate and up have column tiles of their own.
  if (problem.gated && problem.n % (2 * kTile) != 0) return false;
  const double pieces = expected_pieces(problem) / device.sm_count;
  const int k_tiles = problem.k / kTile;
  return pieces >= kMinPieces &&
         pieces * k_tiles >= (k_tiles < kShortK ? kMinTilesOfShortK : kMinTiles);
}

TileChoice select_stream_tile(const GemmProblem& problem, const DeviceLimits& device) {
  TileChoice choice = {};
  choice.kernel = Kernel::kStream;
  for (int tile = 1; tile < kNumStreamTiles; ++tile) {
    const double clocks = estimate(problem, kStreamTable[tile], device.sm_count);
    const double least = estimate(problem, kStreamTable[choice.tile], device.sm_count);
    if (clocks < least) choice.tile = tile;
  }
  choice.sub_blocks = choice.split_k = 1;
  choice.row_blocks = ceil_div(problem.rows, problem.moe_block_size);
  choice.n_blocks = static_cast<int>(ceil_div(problem.n, kStreamColumns));
  return choice;
}

}  // namespace jax_marlin
