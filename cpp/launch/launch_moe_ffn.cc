// The launches of a MoE layer, each overlapping the end of the one before.

#include "launch_moe_ffn.h"

#include "../kernel/tile_config.h"
#include "select_layer.h"

namespace jax_marlin {
namespace {

LayerProblem problem_of(const MoeFfnLaunch& layer) {
  const GemmParams &gate_up = layer.gate_up.params, &down = layer.down.params;
  const AlignParams& align = layer.align;
  LayerProblem problem = {};
  problem.tokens = layer.combine.tokens;
  problem.top_k = layer.combine.top_k;
  problem.num_experts = align.num_experts;
  problem.hidden = gate_up.k;
  problem.intermediate = down.k;
  problem.columns = down.n;
  problem.gate_up_bits = layer.gate_up.bits;
  problem.down_bits = layer.down.bits;
  problem.down_gathers = layer.down_perm != nullptr;
  problem.slots = align.slots;
  problem.moe_block_size = align.moe_block_size;
  problem.room_for_x = int64_t{align.slots} * gate_up.x_stride * 2 <= layer.rows_bytes;
  problem.room_for_hidden = layer.hidden_rows >= align.slots;
  return problem;
}

void set_routing(GemmParams& p, const AlignParams& align, bool tables) {
  p.out_rows = align.routes;
  if (tables) {
    p.sorted_token_ids = align.sorted_token_ids;
    p.expert_ids = align.expert_ids;
    p.num_tokens_past_padded = align.num_tokens_past_padded;
    p.slots = align.slots;
    p.moe_block_size = align.moe_block_size;
  } else {
    p.topk_ids = align.topk_ids;
    p.slots = align.routes;
    p.moe_block_size = 1;
  }
}

// down's routes summed to rows of out: no rows of their own, and no launch to sum them.
void sum_in_down(MoeFfnLaunch& layer) {
  GemmParams& p = layer.down.params;
  p.out = layer.combine.out;
  p.out_rows = layer.combine.tokens;
  p.out_is_float32 = false;
  p.routes_of_row = layer.combine.top_k;
  while (p.routes_of_row << (p.route_shift + 1) <= kWarps) ++p.route_shift;
}

// x's routed rows, in act-order when there is a `perm`, in one launch: the GEMM then reads a row of
// its own for each route or, if it reads x by slot, for each slot.
cudaError_t gather(GemmParams& p, const int* perm, const AlignParams& align, void* gathered,
                   Order order, cudaStream_t stream) {
  GatherParams g = {};
  if (p.x_by_slot) {
    g.by_slot = true;
    g.sorted_token_ids = p.sorted_token_ids;
    g.expert_ids = p.expert_ids;
    g.num_tokens_past_padded = p.num_tokens_past_padded;
    g.moe_block_size = p.moe_block_size;
  } else {
    g.topk_ids = align.topk_ids;
  }
  g.x = static_cast<const uint16_t*>(p.x);
  g.perm = perm;
  g.gathered = static_cast<uint16_t*>(gathered);
  g.x_stride = p.x_stride;
  g.out_rows = align.routes;
  g.slots = p.x_by_slot ? p.slots : align.routes;
  g.k = p.k;
  g.num_experts = p.num_experts;
  g.row_divisor = p.row_divisor;
  p.x = gathered;
  p.row_divisor = 1;
  p.x_is_pending = true;
  return launch_gather(g, order, stream);
}

}  // namespace

void plan_moe_ffn(MoeFfnLaunch& layer, const DeviceLimits& device) {
  const LayerChoice choice = select_layer(problem_of(layer), device);
  for (GemmLaunch* gemm : {&layer.gate_up, &layer.down}) {
    set_routing(gemm->params, layer.align, choice.tables);
  }
  layer.gate_up.choice = choice.gate_up;
  layer.gate_up.params.next_fits_beside = choice.down_fits_beside;
  layer.gate_up.params.x_by_slot = choice.gate_up.in_boxes;
  layer.down.choice = choice.down;
  layer.down.params.x_by_slot = layer.gate_up.params.out_by_slot = choice.down.in_boxes;
  layer.down.params.x_is_pending = true;
  if (choice.sums_routes) sum_in_down(layer);
}

cudaError_t launch_moe_ffn(const MoeFfnLaunch& layer, cudaStream_t stream) {
  GemmLaunch gate_up = layer.gate_up, down = layer.down;
  // First, so that nothing stands between two kernels that overlap.
  cudaError_t status = clear_arrivals(down, stream);  // gate_up's K is never split here
  Order order = arrivals_bytes(down.choice) == 0 ? Order::kAfter : Order::kOverlap;
  const auto follow = [&](cudaError_t launched) {
    status = launched;
    order = Order::kOverlap;
  };
  if (status == cudaSuccess && gate_up.params.sorted_token_ids != nullptr) {
    follow(launch_align(layer.align, stream));
  }
  if (status == cudaSuccess && (layer.gate_up_perm != nullptr || gate_up.params.x_by_slot)) {
    // By slot there is more to hold than `gathered_x` has room for; nobody has written rows yet.
    void* to = gate_up.params.x_by_slot ? down.params.out : layer.gathered_x;
    follow(gather(gate_up.params, layer.gate_up_perm, layer.align, to, order, stream));
  }
  if (status == cudaSuccess) follow(launch_gemm(gate_up, order, stream));
  if (status == cudaSuccess && layer.down_perm != nullptr) {
    follow(gather(down.params, layer.down_perm, layer.align, layer.gathered_hidden, order, stream));
  }
  if (status == cudaSuccess) follow(launch_gemm(down, order, stream));
  if (status == cudaSuccess && down.params.routes_of_row == 0) {
    follow(launch_combine(layer.combine, down.element, order, stream));
  }
  return status;
}

}  // namespace jax_marlin
