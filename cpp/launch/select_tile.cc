// The tile that takes all rows, its width, and a K split that fills the GPU.

#include "select_tile.h"

#include <algorithm>

#include "tile_table.h"

namespace jax_marlin {
namespace {

// At least as many multiprocessors as any GPU has: with the table it bounds the scratch.
constexpr int kMaxSmCount = 216;
constexpr int kMaxSplitK = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that the GPU holds at once; K is split only up to there.
int64_t max_split_blocks(const TileConfig& tile, int bits, int sm_count) {
  return static_cast<int64_t>(sm_count) * tile.blocks_per_sm(bits);
}

int64_t tile_rows(const GemmProblem& problem) {
  return problem.moe_block_size > 0 ? problem.moe_block_size : problem.rows;
}

// The smallest tile that takes all rows, else the largest; of its widths the narrow one.
int narrow_tile(const GemmProblem& problem) {
  int tile = 0;
  for (int next = 1; next < kNumTiles && kTileTable[tile].tile_m < tile_rows(problem); ++next) {
    if (kTileTable[next].tile_m > kTileTable[tile].tile_m) tile = next;
  }
  return tile;
}

bool has_wide(int narrow) {
  return narrow + 1 < kNumTiles && kTileTable[narrow + 1].tile_m == kTileTable[narrow].tile_m;
}

// Thresholds measured on an H200; see the table for why.
bool prefers_wide(const GemmProblem& problem, int narrow, int sm_count) {
  const TileConfig& wide = kTileTable[narrow + 1];
  if (wide.tile_m == 8) {
    const int64_t rows_of_blocks = std::max<int64_t>(tile_rows(problem), 1);
    const int64_t blocks =
        ceil_div(problem.rows, rows_of_blocks) * ceil_div(problem.n, wide.columns());
    return problem.k <= 2048 && blocks >= 2 * sm_count;
  }
  return static_cast<int64_t>(problem.k) * problem.n >= int64_t{1} << 26;
}

}  // namespace

TileChoice select_tile(const GemmProblem& problem, int sm_count) {
  const bool routed = problem.moe_block_size > 0;
  TileChoice choice;
  choice.tile = narrow_tile(problem);
  if (has_wide(choice.tile) && prefers_wide(problem, choice.tile, sm_count)) ++choice.tile;
  const TileConfig& tile = kTileTable[choice.tile];
  choice.sub_blocks = routed ? static_cast<int>(ceil_div(problem.moe_block_size, tile.tile_m)) : 1;
  choice.row_blocks = routed ? ceil_div(problem.rows, problem.moe_block_size) * choice.sub_blocks
                             : ceil_div(problem.rows, tile.tile_m);
  choice.n_blocks = static_cast<int>(ceil_div(problem.n, tile.columns()));

  // Split K while blocks are fewer than the GPU can hold at once and each part still feeds all
  // warps of K with half a ring; a part more costs one more round through scratch.
  const int64_t blocks = std::max<int64_t>(choice.row_blocks * choice.n_blocks, 1);
  const int64_t wanted =
      max_split_blocks(tile, problem.bits, std::min(sm_count, kMaxSmCount)) / blocks;
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
  // Whatever the device, parts are no more than this; arrivals are at most one a part.
  const int narrow = narrow_tile(problem);
  int64_t bytes = 0;
  for (int tile = narrow; tile <= narrow + (has_wide(narrow) ? 1 : 0); ++tile) {
    const int64_t n_blocks = ceil_div(problem.n, kTileTable[tile].columns());
    const int64_t parts = max_split_blocks(kTileTable[tile], problem.bits, kMaxSmCount);
    if (2 * n_blocks > parts) continue;
    const int64_t words = parts * (kTileTable[tile].elements() + 1);
    bytes = std::max(bytes, words * static_cast<int64_t>(sizeof(float)) + 256);
  }
  return bytes;
}

}  // namespace jax_marlin
