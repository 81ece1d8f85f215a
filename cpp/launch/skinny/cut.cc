// Teams of warps, the pieces of each, and which problems they suit.

#include "cut.h"

#include <algorithm>
#include <bit>

#include "tile_table.h"

namespace jax_marlin {
namespace {

// The first that takes all rows.
int fitting_tile(const GemmProblem& problem) {
  int tile = 0;
  while (kSkinnyTable[tile].rows < problem.rows) ++tile;
  return tile;
}

// Clusters that run at once, a block on each multiprocessor. Each lies within 16 or 18 of those, or
// fewer: the 132 of one H200 have room for 66 of 2 blocks and 30 of 4.
int clusters_at_once(int parts, int sm_count) {
  return std::max((parts > 2 ? sm_count * 10 / 11 : sm_count) / parts, 1);
}

SkinnyPlan cut_at(const SkinnyTile& tile, int rows, int k_tiles, int n, int sm_count, int parts,
                  int k_shift) {
  SkinnyPlan plan = {};
  SkinnyCut& cut = plan.cut;
  cut.parts = parts;
  cut.row_shift = std::bit_width(static_cast<unsigned>(ceil_div(rows, parts) - 1));
  cut.k_shift = k_shift;
  cut.slice_tiles = static_cast<int>(ceil_div(k_tiles, parts << k_shift));
  cut.slices = static_cast<int>(ceil_div(k_tiles, cut.slice_tiles));
  const auto pieces = static_cast<int>(ceil_div(n, kSkinnyColumns));
  plan.clusters = std::min(clusters_at_once(parts, sm_count), pieces);
  const int teams = plan.clusters * (tile.warps >> k_shift);
  cut.pieces = pieces / teams;
  cut.more = pieces % teams;
  // 16 bytes of padding a row turn the row pitch into 4 banks modulo 32: ldmatrix has no conflict.
  cut.x_pitch = cut.slice_tiles * kTile + 8;
  const int64_t sums_at =
      kSkinnyBarrierBytes + (int64_t{rows} << k_shift) * (int64_t{cut.x_pitch} * 2);
  cut.sums_at = static_cast<int>(std::min<int64_t>(sums_at, INT32_MAX));
  const int most = static_cast<int>(ceil_div(pieces, teams));
  const int64_t slots = int64_t{most} * tile.warps * parts * std::min(rows, 1 << cut.row_shift);
  plan.shared_bytes = sums_at + slots * kSkinnySumPitch * static_cast<int64_t>(sizeof(float));
  plan.warp_tiles = most * cut.slice_tiles;
  return plan;
}

}  // namespace

SkinnyPlan cut_skinny(const SkinnyTile& tile, int rows, int k_tiles, int n, int sm_count) {
  constexpr int64_t kMuchX = 48 * 1024;  // bytes, which take a block longer than parts to meet
  const int64_t x_bytes = int64_t{rows} * k_tiles * kTile * 2;
  const auto fits = [](const SkinnyPlan& plan) { return plan.shared_bytes <= kSharedOfBlock; };
  SkinnyPlan best = {};
  for (int parts = x_bytes >= kMuchX ? 2 : 1; parts <= kSkinnyMaxParts; parts *= 2) {
    // The fewest packed tiles for the busiest warp; the fewer warps share a K, the fewer sums there
    // are. A slice has a turn of the ring at least.
    for (int k_shift = 0; 1 << k_shift <= tile.warps; ++k_shift) {
      if (k_shift > 0 && tile.depth * parts << k_shift > k_tiles) break;
      const SkinnyPlan plan = cut_at(tile, rows, k_tiles, n, sm_count, parts, k_shift);
      if (best.clusters == 0 ||
          (fits(plan) && (!fits(best) || plan.warp_tiles < best.warp_tiles))) {
        best = plan;
      }
    }
    if (fits(best)) break;
  }
  return best;
}

// Measured on an H200, K from 1024 to 28672, N from 128 to 28672. A long K of few columns is better
// cut between more blocks, if rows are few. More than 16 cost a block as much x as weights, which
// pays where none has more than a piece.
bool prefers_skinny(const GemmProblem& problem, const DeviceLimits& device) {
  constexpr int kFewRows = 8, kManyRows = 16, kLongK = 4096;
  constexpr double kFewPieces = 0.2;  // of a multiprocessor
  const bool dense = problem.moe_block_size == 0 && !problem.gated && !problem.transposed;
  if (!device.has_wgmma || !dense) return false;
  if (problem.k < kTile || problem.k % kTile != 0 || problem.n < 1 || problem.rows < 1)
    return false;
  if (problem.rows > kSkinnyTable[kNumSkinnyTiles - 1].rows) return false;
  // Of a block, at least. Products of a size that no int holds end here.
  if (problem.rows * problem.k * 2 / kSkinnyMaxParts > kSharedOfBlock) return false;
  const auto pieces = static_cast<int>(ceil_div(problem.n, kSkinnyColumns));
  const bool few_columns = pieces < kFewPieces * device.sm_count;
  if (problem.rows <= kFewRows && problem.k > kLongK && few_columns) return false;
  const SkinnyPlan plan =
      cut_skinny(kSkinnyTable[fitting_tile(problem)], static_cast<int>(problem.rows),
                 problem.k / kTile, problem.n, device.sm_count);
  if (problem.rows > kManyRows && pieces > plan.clusters * plan.cut.parts) return false;
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
