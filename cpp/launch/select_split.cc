// Parts of K where blocks are too few, and where a part lets x stay in shared memory.

#include "select_split.h"

#include <algorithm>
#include <bit>

#include "residence.h"
#include "tile_table.h"

namespace jax_marlin {
namespace {

// Blocks leave half of the multiprocessors idle: as many parts as fill them, each of which still
// feeds all warps of K with half a ring. A part costs a round through scratch, or a meeting in the
// cluster, and clusters of powers of two leave the fewest multiprocessors idle.
int split_to_fill(const GemmProblem& problem, const TileConfig& tile, int64_t blocks,
                  const DeviceLimits& device) {
  const int64_t wanted = std::min(device.sm_count, kMaxSmCount) / blocks;
  const int64_t deepest =
      ceil_div(problem.k, kTile) / (tile.warps_k() * std::max(tile.depth / 2, 1));
  const auto parts = static_cast<unsigned>(
      std::max<int64_t>(std::min({wanted, deepest, static_cast<int64_t>(kMaxSplit)}), 1));
  return static_cast<int>(device.has_wgmma ? std::bit_floor(parts) : parts);
}

// The narrowest blocks cannot be cut finer: two parts where K is long, or where some
// multiprocessors would have twice the work of others, for the few rows whose K takes longest.
int split_narrowest(const GemmProblem& problem, int64_t blocks, int sm_count) {
  constexpr int kLongK = 8192, kFewRows = 4;
  const int64_t rows = problem.moe_block_size > 0 ? problem.moe_block_size : problem.rows;
  const bool uneven = 10 * blocks > 11 * sm_count && 10 * blocks < 16 * sm_count;
  const bool pays = problem.k >= kLongK || (2 * problem.k >= kLongK && uneven);
  return rows <= kFewRows && blocks <= 2 * sm_count && pays ? 2 : 1;
}

// With very few rows an expert, the fewest parts of a long K that let each keep its part of x.
int split_to_reside(const GemmProblem& problem, const TileConfig& tile,
                    const DeviceLimits& device) {
  constexpr int kFewRows = 4, kMostParts = 4;
  if (problem.moe_block_size > kFewRows) return 1;
  for (int split_k = 1; split_k <= kMostParts; split_k *= 2) {
    if (may_reside(problem, tile, split_k, device)) return split_k;
  }
  return 1;
}

}  // namespace

int select_split(const GemmProblem& problem, const TileChoice& choice, const DeviceLimits& device) {
  const TileConfig& tile = tile_at(choice.tile);
  const int64_t blocks = std::max<int64_t>(choice.row_blocks * choice.n_blocks, 1);
  if (problem.gated) return 1;
  if (2 * blocks <= device.sm_count) return split_to_fill(problem, tile, blocks, device);
  if (problem.transposed) return 1;
  if (!device.has_wgmma) return 1;  // only in clusters is a part worth less than that
  if (choice.tile == 0) return split_narrowest(problem, blocks, device.sm_count);
  return split_to_reside(problem, tile, device);
}

}  // namespace jax_marlin
