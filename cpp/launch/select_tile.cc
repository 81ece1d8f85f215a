// The tile that takes all rows, and its width.

#include "select_tile.h"

#include <algorithm>
#include <cmath>

#include "select_split.h"
#include "skinny/cut.h"
#include "stream/select_tile.h"
#include "tile_table.h"
#include "wgmma/select_tile.h"

namespace jax_marlin {
namespace {

// Tiles [first, last] with the smallest tile_m that takes all rows, else with the largest.
struct TileRange {
  int first, last;
};

TileRange fitting_tiles(const GemmProblem& problem) {
  const int64_t rows = tile_rows(problem);
  const int begin = problem.transposed ? kFirstTransposed : 0;
  const int end = problem.transposed ? kNumInstances : kNumTiles;
  TileRange range = {begin, begin};
  for (int tile = begin + 1; tile < end; ++tile) {
    const int tile_m = tile_at(tile).tile_m;
    if (tile_m == tile_at(range.last).tile_m) {
      range.last = tile;
    } else if (tile_at(range.last).tile_m < rows) {
      range = {tile, tile};
    }
  }
  return range;
}

int64_t row_blocks(const GemmProblem& problem, int tile_m) {
  if (problem.moe_block_size == 0) return ceil_div(problem.rows, tile_m);
  return ceil_div(problem.rows, problem.moe_block_size) * ceil_div(problem.moe_block_size, tile_m);
}

// Among the tiles of 8 rows: the widest that still gives each multiprocessor two blocks.
int select_narrow_rows(const GemmProblem& problem, const TileRange& range, int sm_count) {
  constexpr int kLongK = 8192, kBlocksPerSm = 4;
  const double row_blocks = expected_row_blocks(problem, kTileTable[range.first].tile_m);
  const auto blocks = [&](int tile) {
    return row_blocks * static_cast<double>(ceil_div(problem.n, kTileTable[tile].columns()));
  };
  // Columns of the busiest multiprocessor.
  const auto most_columns = [&](int tile) {
    return std::ceil(blocks(tile) / sm_count) * kTileTable[tile].columns();
  };
  const int deep = range.last, wide = deep - 1;  // equally wide: for long K, and for short
  const int widest = problem.k >= kLongK ? deep : wide, next = wide - 1;
  if (blocks(widest) < 1.9 * sm_count) {
    int tile = next;
    while (tile > range.first && blocks(tile) < 1.9 * sm_count) --tile;
    return tile;
  }
  // Finer blocks of long K end closer together: in several waves, and where all run at once but
  // some multiprocessors have one more.
  if (problem.k < kLongK / 2) return widest;
  if (blocks(widest) <= kBlocksPerSm * sm_count) {
    return most_columns(next) * 1.1 < most_columns(widest) ? next : widest;
  }
  return next;
}

int select_width(const GemmProblem& problem, int sm_count) {
  const TileRange range = fitting_tiles(problem);
  const int tile_m = kTileTable[range.first].tile_m;
  if (tile_m == 8) return select_narrow_rows(problem, range, sm_count);
  const auto blocks_of = [&](int tile) {
    return row_blocks(problem, kTileTable[tile].tile_m) *
           ceil_div(problem.n, kTileTable[tile].columns());
  };
  const int narrow = std::max(range.first, range.last - 1);
  // The narrowest of 16 rows where its blocks run at once: K is split least.
  if (range.first < narrow && blocks_of(range.first) <= sm_count) return range.first;
  // Wide where it gives each multiprocessor two blocks, or where weights are large all the same.
  const int64_t blocks = blocks_of(range.last);
  const int64_t large = int64_t{1} << (tile_m == 16 ? 25 : 26);
  const bool fits = static_cast<int64_t>(problem.k) * problem.n >= large || blocks >= 2 * sm_count;
  return fits ? range.last : narrow;
}

}  // namespace

// Routes spread evenly over the experts leave some without any. (1 - 1 / E)^R is the share of the E
// experts that R routes miss.
double expected_row_blocks(const GemmProblem& problem, int tile_m) {
  const double bound = static_cast<double>(row_blocks(problem, tile_m));
  if (problem.routes == 0 || problem.num_experts == 0) return bound;
  const double experts = problem.num_experts, routes = static_cast<double>(problem.routes);
  const double touched = experts * -std::expm1(routes * std::log1p(-1. / std::max(experts, 2.)));
  return std::min(bound, std::max(touched, routes / problem.moe_block_size));
}

TileChoice tile_choice(const GemmProblem& problem, int tile, const DeviceLimits& device) {
  const TileConfig& config = tile_at(tile);
  TileChoice choice;
  choice.tile = tile;
  choice.sub_blocks =
      static_cast<int>(std::max<int64_t>(ceil_div(problem.moe_block_size, config.tile_m), 1));
  choice.row_blocks = row_blocks(problem, config.tile_m);
  choice.n_blocks = static_cast<int>(ceil_div(problem.n, config.columns()));
  choice.split_k = select_split(problem, choice, device);
  choice.in_cluster = choice.split_k > 1 && device.has_wgmma;
  return choice;
}

TileChoice select_mma_tile(const GemmProblem& problem, const DeviceLimits& device) {
  return tile_choice(problem, select_width(problem, device.sm_count), device);
}

TileChoice select_tile(const GemmProblem& problem, const DeviceLimits& device) {
  if (problem.transposed) return tile_choice(problem, fitting_tiles(problem).first, device);
  if (prefers_skinny(problem, device)) return select_skinny(problem);
  if (prefers_stream(problem, device)) return select_stream_tile(problem, device);
  if (device.has_wgmma && prefers_wgmma(problem, device.sm_count)) {
    return select_wgmma_tile(problem, device.sm_count);
  }
  return select_mma_tile(problem, device);
}

int64_t arrivals_bytes(const TileChoice& choice) {
  if (choice.split_k == 1 || choice.in_cluster) return 0;
  return ceil_div(choice.row_blocks * choice.n_blocks * static_cast<int64_t>(sizeof(int)), 256) *
         256;
}

int64_t scratch_bytes(const TileChoice& choice) {
  if (choice.split_k == 1 || choice.in_cluster) return 0;
  const int64_t parts = choice.row_blocks * choice.n_blocks * choice.split_k;
  return arrivals_bytes(choice) +
         parts * tile_at(choice.tile).elements() * static_cast<int64_t>(sizeof(float));
}

int64_t max_scratch_bytes(const GemmProblem& problem) {
  if (problem.gated) return 0;
  // Whatever the device, parts are no more than this; arrivals are at most one a part.
  const TileRange range = fitting_tiles(problem);
  int64_t bytes = 0;
  for (int tile = range.first; tile <= range.last; ++tile) {
    const int64_t n_blocks = ceil_div(problem.n, tile_at(tile).columns());
    if (2 * n_blocks > kMaxSmCount) continue;
    const int64_t words = int64_t{kMaxSmCount} * (tile_at(tile).elements() + 1);
    bytes = std::max(bytes, words * static_cast<int64_t>(sizeof(float)) + 256);
  }
  return bytes;
}

}  // namespace jax_marlin
