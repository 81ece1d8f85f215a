// Which row of the tile table serves a problem, and how K is split: pure functions of static sizes.
#pragma once

#include <cstdint>

namespace jax_marlin {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct GemmProblem {
  int64_t rows;  // dense: M; routed: slots of sorted_token_ids, or routes when there are no tables
  int moe_block_size;  // 0 when dense, 1 when routed without tables
  int k, n;  // n: columns of the weight that the call reads
  int bits;
  bool gated = false;  // gate and up columns meet in one block, whose K is not split
  int64_t routes = 0;  // routed by tables: what the slots hold without padding, over
  int num_experts = 0;  // this many experts
  bool x_by_slot = false;  // routed by tables: rows of x lie in the order of slots
  bool transposed = false;  // x W^T: k is the weight's N, and n its K
};

// Rows that one tile should take: a routing block's, or all.
inline int64_t tile_rows(const GemmProblem& problem) {
  return problem.moe_block_size > 0 ? problem.moe_block_size : problem.rows;
}

// What of a GPU the choice depends on.
struct DeviceLimits {
  int sm_count;
  bool has_wgmma;  // sm_90, and its code compiled in: clusters and bulk copies, too
};

// kMma: blocks that end with their piece, whose tiles tile_at counts. Each of the others has a
// table of its own: kWgmmaTable, kStreamTable, kSkinnyTable.
enum class Kernel { kMma, kWgmma, kStream, kSkinny };

struct TileChoice {
  Kernel kernel = Kernel::kMma;
  int tile;  // row of that kernel's table
  int sub_blocks;  // row blocks of one routing block; 1 when dense
  int64_t row_blocks;  // an upper bound when routed: unused ones leave at once
  int n_blocks;
  int split_k;
  bool in_cluster = false;  // the blocks that split K are a cluster, which needs no scratch
  int share_x = 1;  // wgmma: blocks of a cluster that copy rows of x for each other
  bool in_boxes = false;  // wgmma: rows of x must be neighbours, dense or by slot
};

TileChoice select_tile(const GemmProblem& problem, const DeviceLimits& device);
// Of those whose blocks end with their piece alone, as tile_at counts them.
TileChoice select_mma_tile(const GemmProblem& problem, const DeviceLimits& device);

// Row blocks of up to tile_m rows that a call will run, as far as static sizes tell.
double expected_row_blocks(const GemmProblem& problem, int tile_m);

// What tile_at(tile) makes of a problem, best or not.
TileChoice tile_choice(const GemmProblem& problem, int tile, const DeviceLimits& device);

// Scratch layout: arrivals first, one int an output tile, then the partial sums.
int64_t arrivals_bytes(const TileChoice& choice);
int64_t scratch_bytes(const TileChoice& choice);

// Enough for any device: what a trace can promise without knowing the GPU. Bounded in `rows`.
int64_t max_scratch_bytes(const GemmProblem& problem);

}  // namespace jax_marlin
