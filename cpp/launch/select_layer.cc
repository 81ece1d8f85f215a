// Tables or none, a sum within down or a launch of its own, and how much room gate_up leaves.

#include "select_layer.h"

#include "tile_table.h"

namespace jax_marlin {
namespace {

// Columns of gate_up that repay a pass which brings x to the order of slots.
constexpr int kColumnsForSlots = 4096;

int64_t routes_of(const LayerProblem& layer) { return layer.tokens * layer.top_k; }

// Few routes rarely meet at one expert, and tables cost a launch: then each route is a block.
bool needs_tables(const LayerProblem& layer) {
  return layer.tokens > 1 && 4 * routes_of(layer) > layer.num_experts;
}

// A warp takes a route, so there are no more of them than warps. Blocks that sum routes are as
// narrow as a fragment, which suits weights that are few and late; many stream better in wide
// blocks, and a sum of its own.
bool sums_routes(const LayerProblem& layer) {
  constexpr int64_t kMostBytes = int64_t{12} << 20;
  const int64_t codes = routes_of(layer) * layer.intermediate * layer.columns;
  return !needs_tables(layer) && layer.top_k <= kWarps && codes / 8 * layer.down_bits <= kMostBytes;
}

TileChoice choose_routes_tile(const LayerProblem& layer) {
  TileChoice choice = {};
  choice.tile = kRoutesTileIndex;
  choice.sub_blocks = choice.split_k = 1;
  choice.row_blocks = layer.tokens;
  choice.n_blocks = static_cast<int>(ceil_div(layer.columns, kRoutesTile.columns()));
  return choice;
}

// Whether the registers of each multiprocessor hold one of down's blocks beside all of gate_up's.
bool leaves_room(const TileChoice& gate_up, const LayerProblem& layer, int sm_count) {
  const int64_t blocks = ceil_div(gate_up.row_blocks * gate_up.n_blocks, sm_count);
  const int64_t most = kTileTable[gate_up.tile].blocks_per_sm(layer.gate_up_bits);
  const int64_t most_of_down = kRoutesTile.blocks_per_sm(layer.down_bits);
  return blocks * most_of_down + most <= most * most_of_down;  // blocks / most + 1 / most_of_down
}

// Takes for gate_up the narrowest tile, from the one that is best alone, that leaves room for down.
// A wider one still has a block for each multiprocessor.
bool make_room(TileChoice& gate_up, const GemmProblem& problem, const LayerProblem& layer,
               const DeviceLimits& device) {
  const int tile_m = kTileTable[gate_up.tile].tile_m;
  for (int tile = gate_up.tile; tile < kNumTiles && kTileTable[tile].tile_m == tile_m; ++tile) {
    const TileChoice choice = tile_choice(problem, tile, device);
    if (tile > gate_up.tile && choice.row_blocks * choice.n_blocks < device.sm_count) break;
    if (leaves_room(choice, layer, device.sm_count)) {
      gate_up = choice;
      return true;
    }
  }
  return false;
}

}  // namespace

LayerChoice select_layer(const LayerProblem& layer, const DeviceLimits& device) {
  LayerChoice choice = {};
  choice.tables = needs_tables(layer);
  const int64_t routes = routes_of(layer), rows = choice.tables ? layer.slots : routes;
  const int block = choice.tables ? layer.moe_block_size : 1;
  GemmProblem gate_up = {rows, block,  layer.hidden,     2 * layer.intermediate, layer.gate_up_bits,
                         true, routes, layer.num_experts};
  GemmProblem down = {rows,  block,  layer.intermediate, layer.columns, layer.down_bits,
                      false, routes, layer.num_experts};
  gate_up.x_by_slot = choice.tables && layer.room_for_x && gate_up.n >= kColumnsForSlots;
  choice.sums_routes = sums_routes(layer);
  choice.gate_up = select_tile(gate_up, device);
  // Only in code of sm_90 does a kernel wait for the one before it, and so may start early: beside
  // one that leaves room, which streaming blocks rarely do.
  if (choice.sums_routes && !layer.down_gathers && device.has_wgmma) {
    TileChoice roomy = select_mma_tile(gate_up, device);
    choice.down_fits_beside = make_room(roomy, gate_up, layer, device);
    if (choice.down_fits_beside) choice.gate_up = roomy;
  }
  // Only the wgmma kernel writes by slot. Act-order gathers hidden rows by route.
  down.x_by_slot = choice.tables && layer.room_for_hidden && !layer.down_gathers &&
                   choice.gate_up.kernel == Kernel::kWgmma;
  choice.down = choice.sums_routes ? choose_routes_tile(layer) : select_tile(down, device);
  return choice;
}

}  // namespace jax_marlin
