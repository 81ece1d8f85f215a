// Parts of K where blocks are too few.

#include "select_split.h"

#include <algorithm>
#include <bit>

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
  const bool uneven = 10 * blocks > 11 * sm_count && 10 * blocks < 16 * sm_count;
  const bool pays = problem.k >= kLongK || (2 * problem.k >= kLongK && uneven);
  return tile_rows(problem) <= kFewRows && blocks <= 2 * sm_count && pays ? 2 : 1;
}

}  // namespace

int select_split(const GemmProblem& problem, const TileChoice& choice, const DeviceLimits& device) {
  const TileConfig& tile = tile_at(choice.tile);
  const int64_t blocks = std::max<int64_t>(choice.row_blocks * choice.n_blocks, 1);
  if (problem.gated) return 1;
  if (2 * blocks <= device.sm_count) return split_to_fill(problem, tile, blocks, device);
  if (problem.transposed) return 1;
  if (!device.has_wgmma) return 1;  // only in clusters is a part worth less than that
  return choice.tile == 0 ? split_narrowest(problem, blocks, device.sm_count) : 1;
}

}  // namespace jax_marlin
