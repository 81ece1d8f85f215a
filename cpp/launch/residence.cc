// x stays where nearly as many blocks as the registers allow still share a multiprocessor.

#include "residence.h"

#include <algorithm>

namespace jax_marlin {
namespace {

constexpr int kElementBytes = 2;

// Bulk copies arrive later than a ring's first stage: dense products, a block or two on each
// multiprocessor, wait for that; experts' products have others to run meanwhile. Copies ask for
// runs of 16 bytes, and for gate and up in column tiles of their own.
bool serves(const GemmParams& p, const TileConfig& tile, const DeviceLimits& device) {
  const bool routed = p.sorted_token_ids != nullptr || p.topk_ids != nullptr;
  const bool gated = p.activation != Activation::kNone;
  return routed && device.has_wgmma && tile.can_reside() && p.k % 8 == 0 &&
         (!gated || p.n % kTile == 0) && (p.num_groups == 1 || p.group_size % kHalf == 0);
}

int rows_of_block(const GemmParams& p, const TileConfig& tile) {
  return p.topk_ids != nullptr ? 1 : std::min(p.moe_block_size, tile.tile_m);
}

// Blocks of a multiprocessor that x must leave room for, where blocks run in several waves: beyond
// two, one fewer than the registers allow. That costs less in warps than a ring in instructions.
int blocks_beside(const TileConfig& tile, int bits) {
  const int most = tile.blocks_per_sm(bits);
  return std::max(most - 1, std::min(most, 2));
}

}  // namespace

Residence select_residence(const GemmParams& p, const TileChoice& choice, const TileConfig& tile,
                           int bits, int fixed_bytes, const DeviceLimits& device) {
  if (!serves(p, tile, device)) return {};
  const int rows = rows_of_block(p, tile);
  const int64_t k = ceil_div(p.k_tiles, choice.split_k) * kTile;
  // A part of K may begin and end inside a group.
  const int64_t groups = std::min<int64_t>(p.num_groups, ceil_div(k, p.group_size) + 1);
  const int sets = p.zero_points == nullptr ? 1 : 2;
  const int64_t bytes =
      rows * (k + 8) * kElementBytes + sets * kResidentTiles * groups * kTile * kElementBytes;
  const int64_t blocks =
      ceil_div(choice.row_blocks * choice.n_blocks * choice.split_k, device.sm_count);
  // Where all blocks run at once, they still must.
  const bool at_once = blocks <= tile.blocks_per_sm(bits);
  const int64_t together = at_once ? std::max<int64_t>(blocks, 1) : blocks_beside(tile, bits);
  const int64_t whole = fixed_bytes + bytes;
  if (whole > kSharedOfBlock || together * (whole + kSharedReserve) > kSharedOfSm) return {};
  return {rows, static_cast<int>(bytes)};
}

}  // namespace jax_marlin
