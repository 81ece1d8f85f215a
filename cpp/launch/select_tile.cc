// The smallest tile that takes all rows, and a K split that fills the GPU.

#include "select_tile.h"

#include <algorithm>

#include "tile_table.h"

namespace jax_marlin {
namespace {

// More blocks than this never share outputs, on any GPU: it bounds the scratch.
constexpr int64_t kMaxSplitBlocks = 640;
constexpr int kMaxSplitK = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest tile that takes all rows, else the largest.
int tile_for_rows(int64_t rows) {
  int tile = 0;
  while (tile + 1 < kNumTiles && kTileTable[tile].tile_m < rows) ++tile;
  return tile;
}

}  // namespace

TileChoice select_tile(const GemmProblem& problem, int sm_count) {
  const bool routed = problem.moe_block_size > 0;
  TileChoice choice;
  choice.tile = tile_for_rows(routed ? problem.moe_block_size : problem.rows);
  const TileConfig& tile = kTileTable[choice.tile];
  choice.sub_blocks = routed ? static_cast<int>(ceil_div(problem.moe_block_size, tile.tile_m)) : 1;
  choice.row_blocks = routed ? ceil_div(problem.rows, problem.moe_block_size) * choice.sub_blocks
                             : ceil_div(problem.rows, tile.tile_m);
  choice.n_blocks = static_cast<int>(ceil_div(problem.n, tile.columns()));

  // Split K while blocks are fewer than the GPU can hold at once and each part still feeds all
  // warps of K with half a ring; a part more costs one more round through scratch.
  const int64_t blocks = std::max<int64_t>(choice.row_blocks * choice.n_blocks, 1);
  const int64_t wanted =
      std::min<int64_t>(static_cast<int64_t>(sm_count) * tile.blocks_per_sm(problem.bits),
                        kMaxSplitBlocks) /
      blocks;
  const int64_t deepest =
      ceil_div(problem.k, kTile) / (tile.warps_k() * std::max(tile.depth / 2, 1));
  choice.split_k = static_cast<int>(
      std::max<int64_t>(std::min({wanted, deepest, static_cast<int64_t>(kMaxSplitK)}), 1));
  return choice;
}

int64_t arrivals_bytes(const TileChoice& choice) {
  if (choice.split_k == 1) return 0;
  return ceil_div(choice.row_blocks * choice.n_blocks * static_cast<int64_t>(sizeof(int)), 256) *
         256;
}

int64_t scratch_bytes(const TileChoice& choice) {
  if (choice.split_k == 1) return 0;
  const int64_t parts = choice.row_blocks * choice.n_blocks * choice.split_k;
  return arrivals_bytes(choice) +
         parts * kTileTable[choice.tile].elements() * static_cast<int64_t>(sizeof(float));
}

int64_t max_scratch_bytes(const GemmProblem& problem) {
  // Parts never exceed kMaxSplitBlocks, whatever the device; arrivals are at most one a part.
  const int tile =
      tile_for_rows(problem.moe_block_size > 0 ? problem.moe_block_size : problem.rows);
  const int64_t n_blocks = ceil_div(problem.n, kTileTable[tile].columns());
  if (2 * n_blocks > kMaxSplitBlocks) return 0;
  return kMaxSplitBlocks * (kTileTable[tile].elements() + 1) * static_cast<int64_t>(sizeof(float)) +
         256;
}

}  // namespace jax_marlin
