// The tile and the split of K with the smallest estimate of clocks.

#include "select_tile.h"

#include <algorithm>
#include <climits>

#include "../select_split.h"
#include "tile_table.h"

namespace jax_marlin {
namespace {

constexpr int kManyRows = 128;  // of a tile that is as fast as any, row by row
constexpr int kMinRows = 17;  // of a tile; below, an mma.sync tile of 8 or 16 rows does less work
constexpr int kMinRoutedRows = 9;  // where blocks of 16 slots fill the GPU
constexpr WgmmaTile kFewestRows = kWgmmaTable[3].tile;
static_assert(kFewestRows.tile_m == 16, "takes blocks of 9 to 16 slots");

TileChoice choice_of(const GemmProblem& problem, int tile, int split_k) {
  const WgmmaTile& t = kWgmmaTable[tile].tile;
  const bool routed = problem.moe_block_size > 0;
  TileChoice choice;
  choice.kernel = Kernel::kWgmma;
  choice.tile = tile;
  choice.sub_blocks = routed ? static_cast<int>(ceil_div(problem.moe_block_size, t.tile_m)) : 1;
  choice.row_blocks = routed ? ceil_div(problem.rows, problem.moe_block_size) * choice.sub_blocks
                             : ceil_div(problem.rows, t.tile_m);
  choice.n_blocks = static_cast<int>(ceil_div(problem.n, t.columns()));
  choice.split_k = split_k;
  choice.in_cluster = split_k > 1;
  choice.in_boxes = t.in_boxes;
  // Neighbouring columns read the same rows: two blocks together ask L2 for them half as often.
  if (choice.in_boxes && split_k == 1 && choice.n_blocks > 1) choice.share_x = 2;
  return choice;
}

int64_t estimate(const GemmProblem& problem, const TileChoice& choice, int sm_count) {
  const WgmmaTileRow& row = kWgmmaTable[choice.tile];
  const int64_t split_k = choice.split_k;
  const int64_t blocks = choice.row_blocks * choice.n_blocks * split_k;
  const int64_t resident = static_cast<int64_t>(sm_count) * row.tile.min_blocks;
  const int64_t k_tiles = ceil_div(ceil_div(problem.k, kTile), split_k);
  const int64_t block = k_tiles * (blocks <= sm_count ? row.alone : row.full) + row.fixed;
  // How many row blocks a routing uses is known to the device alone: no whole waves to count.
  const bool routed = problem.moe_block_size > 0;
  const int64_t all =
      routed ? std::max(block * blocks / resident, block) : ceil_div(blocks, resident) * block;
  // Parts of K meet in shared memory of the cluster; the more parts the later the last.
  const int64_t elements = int64_t{row.tile.tile_m} * row.tile.columns();
  return all + (split_k == 1 ? 0 : split_k * (750 * split_k + elements / 5));
}

// Rows that are not neighbours cannot come in boxes.
bool serves(const GemmProblem& problem, const WgmmaTile& tile) {
  return !tile.in_boxes || problem.moe_block_size == 0 || problem.x_by_slot;
}

}  // namespace

bool prefers_wgmma(const GemmProblem& problem, int sm_count) {
  const bool pairs = problem.n % (2 * kTile) == 0;  // up starts at a column tile of its own
  if (problem.gated && !pairs) return false;
  if (tile_rows(problem) >= kMinRows) return true;
  if (problem.moe_block_size < kMinRoutedRows) return false;
  // So few rows have one tile, over all of K, which wants two blocks an SM or three.
  const int64_t row_blocks = ceil_div(problem.rows, problem.moe_block_size);
  return row_blocks * ceil_div(problem.n, kFewestRows.columns()) >= 2 * sm_count;
}

TileChoice select_wgmma_tile(const GemmProblem& problem, int sm_count) {
  const bool routed = problem.moe_block_size > 0;
  // Routed: the smallest tile that takes a routing block, else whichever of many rows.
  int fewest_rows = 0, most_rows = INT_MAX;
  if (routed) {
    for (const WgmmaTileRow& row : kWgmmaTable) {
      if (!serves(problem, row.tile)) continue;
      if (row.tile.tile_m >= problem.moe_block_size)
        most_rows = std::min(most_rows, row.tile.tile_m);
    }
    fewest_rows = most_rows == INT_MAX ? kManyRows : most_rows;
  }
  TileChoice best = {};
  int64_t least = INT64_MAX;
  for (int tile = 0; tile < kNumWgmmaTiles; ++tile) {
    const WgmmaTile& t = kWgmmaTable[tile].tile;
    const bool of_blocks = kWgmmaTable[tile].of_blocks;
    if (of_blocks && !routed) continue;
    if (!serves(problem, t) || t.tile_m < fewest_rows || t.tile_m > most_rows) continue;
    if (problem.gated && !t.can_gate()) continue;
    for (int split_k = 1; split_k <= kMaxSplit; split_k *= 2) {
      const TileChoice choice = choice_of(problem, tile, split_k);
      const int64_t blocks = choice.row_blocks * choice.n_blocks * split_k;
      const int64_t resident = static_cast<int64_t>(sm_count) * (split_k == 2 ? t.min_blocks : 1);
      const bool fits = blocks <= resident;
      const bool deep = ceil_div(problem.k, kTile) >= 4 * int64_t{split_k} * t.stage_tiles;
      if (split_k > 1 && !(fits && deep && !problem.gated && !of_blocks)) break;
      const int64_t clocks = estimate(problem, choice, sm_count);
      if (clocks < least) {
        least = clocks;
        best = choice;
      }
    }
  }
  return best;
}

}  // namespace jax_marlin
