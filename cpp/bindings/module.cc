// The extension module `_jax_marlin`: handler capsules by target name, and the pure functions that
// Python and the tests ask without a GPU, or that loading calls. No logic.

#include <cuda_runtime.h>
#include <nanobind/nanobind.h>

#include <sstream>
#include <string>

#include "../ffi/handlers.h"
#include "../launch/instances.h"
#include "../launch/residence.h"
#include "../launch/select_layer.h"
#include "../launch/select_tile.h"
#include "../launch/skinny/cut.h"
#include "../launch/skinny/tile_table.h"
#include "../launch/stream/tile_table.h"
#include "../launch/tile_table.h"
#include "../launch/wgmma/tile_table.h"
#include "packers.h"

namespace nb = nanobind;

namespace jax_marlin {
namespace {

nb::dict registrations() {
  nb::dict targets;
  const auto add = [&targets](const char* name, XLA_FFI_Handler* handler) {
    targets[name] = nb::capsule(reinterpret_cast<void*>(handler));
  };
  add("jax_marlin_matmul_v1", jax_marlin_matmul_v1);
  add("jax_marlin_moe_matmul_v1", jax_marlin_moe_matmul_v1);
  add("jax_marlin_moe_ffn_v1", jax_marlin_moe_ffn_v1);
  add("jax_marlin_transposed_product_v1", jax_marlin_transposed_product_v1);
  add("jax_marlin_moe_align_block_size_v1", jax_marlin_moe_align_block_size_v1);
  return targets;
}

nb::list architectures() {
  nb::list names;
  std::istringstream text(JAX_MARLIN_ARCHITECTURES);
  for (std::string name; std::getline(text, name, ',');) names.append(name.c_str());
  return names;
}

nb::dict describe(const TileConfig& tile) {
  nb::dict row;
  row["tile_m"] = tile.tile_m;
  row["columns"] = tile.columns();
  row["warps_k"] = tile.warps_k();
  row["depth"] = tile.depth;
  row["stages"] = tile.stages;
  nb::dict blocks_per_sm;
  for (const int bits : {4, 8}) blocks_per_sm[nb::int_(bits)] = tile.blocks_per_sm(bits);
  row["blocks_per_sm"] = blocks_per_sm;
  return row;
}

nb::list tile_table() {
  nb::list rows;
  for (const TileConfig& tile : kTileTable) rows.append(describe(tile));
  return rows;
}

nb::dict describe(const TileChoice& choice) {
  nb::dict result;
  constexpr const char* kKernels[] = {"mma", "wgmma", "stream", "skinny"};  // as Kernel has them
  result["kernel"] = kKernels[static_cast<int>(choice.kernel)];
  result["tile"] = choice.tile;
  result["sub_blocks"] = choice.sub_blocks;
  result["row_blocks"] = choice.row_blocks;
  result["n_blocks"] = choice.n_blocks;
  result["split_k"] = choice.split_k;
  result["in_cluster"] = choice.in_cluster;
  result["share_x"] = choice.share_x;
  result["in_boxes"] = choice.in_boxes;
  result["scratch_bytes"] = scratch_bytes(choice);
  return result;
}

nb::dict choose_tile(int64_t rows, int moe_block_size, int k, int n, int bits, int sm_count,
                     bool has_wgmma, bool gated, int64_t routes, int num_experts, bool x_by_slot,
                     bool transposed) {
  return describe(select_tile(
      {rows, moe_block_size, k, n, bits, gated, routes, num_experts, x_by_slot, transposed},
      {sm_count, has_wgmma}));
}

// How a product at row `tile` of the table keeps x, with symmetric codes.
nb::dict choose_residence(int tile, int64_t rows, int moe_block_size, int k, int n, int group_size,
                          int bits, int sm_count, bool has_wgmma, bool gated, bool routed) {
  const GemmProblem problem = {rows, moe_block_size, k, n, bits, gated};
  GemmParams params = {};
  int slots = 0;
  if (routed) (moe_block_size == 1 ? params.topk_ids : params.sorted_token_ids) = &slots;
  params.k = k;
  params.n = gated ? n / 2 : n;
  params.k_tiles = (k + kTile - 1) / kTile;
  params.num_groups = (k + group_size - 1) / group_size;
  params.group_size = group_size;
  params.moe_block_size = moe_block_size;
  if (gated) params.activation = Activation::kSilu;
  const DeviceLimits device = {sm_count, has_wgmma};
  const Residence residence =
      select_residence(params, tile_choice(problem, tile, device), kTileTable[tile], bits,
                       gemm_kernel_bf16_w4(tile, false).stages_at, device);
  nb::dict result;
  result["rows"] = residence.rows;
  result["bytes"] = residence.bytes;
  return result;
}

nb::dict choose_layer(int64_t tokens, int top_k, int num_experts, int hidden, int intermediate,
                      int columns, int bits, int sm_count, bool has_wgmma, bool down_gathers,
                      int64_t slots, int moe_block_size, bool room_for_slots) {
  const LayerProblem layer = {
      tokens, top_k,        num_experts, hidden,         intermediate,   columns,       bits,
      bits,   down_gathers, slots,       moe_block_size, room_for_slots, room_for_slots};
  const LayerChoice choice = select_layer(layer, {sm_count, has_wgmma});
  nb::dict result;
  result["tables"] = choice.tables;
  result["sums_routes"] = choice.sums_routes;
  result["down_fits_beside"] = choice.down_fits_beside;
  result["gate_up"] = describe(choice.gate_up);
  result["down"] = describe(choice.down);
  return result;
}

// By the number that select_tile calls them by.
nb::dict transposed_table() {
  nb::dict rows;
  for (int tile = kFirstTransposed; tile < kNumInstances; ++tile) {
    rows[nb::int_(tile)] = describe(tile_at(tile));
  }
  return rows;
}

nb::list stream_table() {
  nb::list rows;
  for (const StreamTile& row : kStreamTable) {
    nb::dict tile;
    tile["tile_m"] = kStreamRows;
    tile["columns"] = kStreamColumns;
    tile["stage_tiles"] = row.stage_tiles;
    tile["min_blocks"] = row.min_blocks;
    rows.append(tile);
  }
  return rows;
}

nb::list skinny_table() {
  nb::list rows;
  for (const SkinnyTile& row : kSkinnyTable) {
    nb::dict tile;
    tile["tile_m"] = row.rows;
    tile["columns"] = kSkinnyColumns;
    tile["warps"] = row.warps;
    rows.append(tile);
  }
  return rows;
}

nb::dict describe_skinny(int tile, int rows, int k_tiles, int n, int sm_count) {
  if (tile < 0 || tile >= kNumSkinnyTiles || rows < 1 || k_tiles < 1 || n < 1 || sm_count < 1) {
    throw nb::value_error("cut_skinny: there is no such tile, or nothing to cut");
  }
  const SkinnyTile& row = kSkinnyTable[tile];
  const SkinnyPlan plan = cut_skinny(row, rows, k_tiles, n, sm_count);
  nb::dict result;
  result["clusters"] = plan.clusters;
  result["parts"] = plan.cut.parts;
  result["sum_rows"] = 1 << plan.cut.row_shift;
  result["teams"] = plan.clusters * (row.warps >> plan.cut.k_shift);
  result["warps_k"] = 1 << plan.cut.k_shift;
  result["slices"] = plan.cut.slices;
  result["slice_tiles"] = plan.cut.slice_tiles;
  result["pieces"] = plan.cut.pieces;
  result["more"] = plan.cut.more;
  result["x_pitch"] = plan.cut.x_pitch;
  result["sums_at"] = plan.cut.sums_at;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

nb::list wgmma_table() {
  nb::list rows;
  for (const WgmmaTileRow& row : kWgmmaTable) {
    nb::dict tile;
    tile["tile_m"] = row.tile.tile_m;
    tile["columns"] = row.tile.columns();
    tile["stage_tiles"] = row.tile.stage_tiles;
    tile["min_blocks"] = row.tile.min_blocks;
    tile["gated"] = row.tile.can_gate();
    rows.append(tile);
  }
  return rows;
}

}  // namespace

NB_MODULE(_jax_marlin, m) {
  m.def("registrations", &registrations, "FFI target name to handler capsule.");
  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("cuda_version", [] { return CUDART_VERSION; }, "1000 * major + 10 * minor.");
  m.def("architectures", &architectures, "Compiled in, e.g. ['80', '90a', '80-PTX'].");
  m.def("tile_table", &tile_table, "The rows that select_tile chooses from.");
  m.def("select_tile", &choose_tile, nb::arg("rows"), nb::arg("moe_block_size"), nb::arg("k"),
        nb::arg("n"), nb::arg("bits"), nb::arg("sm_count"), nb::arg("has_wgmma") = false,
        nb::arg("gated") = false, nb::arg("routes") = 0, nb::arg("num_experts") = 0,
        nb::arg("x_by_slot") = false, nb::arg("transposed") = false);
  m.def("select_residence", &choose_residence, nb::arg("tile"), nb::arg("rows"),
        nb::arg("moe_block_size"), nb::arg("k"), nb::arg("n"), nb::arg("group_size") = 128,
        nb::arg("bits") = 4, nb::arg("sm_count") = 132, nb::arg("has_wgmma") = true,
        nb::arg("gated") = false, nb::arg("routed") = true);
  m.def("select_layer", &choose_layer, nb::arg("tokens"), nb::arg("top_k"), nb::arg("num_experts"),
        nb::arg("hidden"), nb::arg("intermediate"), nb::arg("columns"), nb::arg("bits"),
        nb::arg("sm_count"), nb::arg("has_wgmma") = false, nb::arg("down_gathers") = false,
        nb::arg("slots") = 0, nb::arg("moe_block_size") = 8, nb::arg("room_for_slots") = false,
        "The kernels of a MoE layer.");
  m.def(
      "routes_tile", [] { return describe(kRoutesTile); }, "The tile that sums a token's routes.");
  m.def("transposed_table", &transposed_table, "The tiles of x W^T.");
  m.def("stream_table", &stream_table, "The rows for few tokens and many weights, on sm_90.");
  m.def("skinny_table", &skinny_table, "The rows for few tokens of one weight, on sm_90.");
  m.def("cut_skinny", &describe_skinny, nb::arg("tile"), nb::arg("rows"), nb::arg("k_tiles"),
        nb::arg("n"), nb::arg("sm_count"), "How the skinny kernel cuts a product.");
  m.def("wgmma_table", &wgmma_table, "The rows for GPUs that have wgmma.");
  m.def(
      "scratch_bytes",
      [](int64_t rows, int moe_block_size, int k, int n, int bits, bool transposed) {
        GemmProblem problem = {rows, moe_block_size, k, n, bits};
        problem.transposed = transposed;
        return max_scratch_bytes(problem);
      },
      nb::arg("rows"), nb::arg("moe_block_size"), nb::arg("k"), nb::arg("n"), nb::arg("bits"),
      nb::arg("transposed") = false, "Scratch that is enough on any GPU.");
  bind_packers(m);
}

}  // namespace jax_marlin
