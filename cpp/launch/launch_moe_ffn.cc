// The launches of a MoE layer, each overlapping the end of the one before.

#include "launch_moe_ffn.h"

namespace jax_marlin {
namespace {

// Few routes rarely meet at one expert, and tables cost a launch: then each route is a block.
bool needs_tables(const MoeFfnLaunch& layer) {
  return layer.combine.tokens > 1 && 4 * int64_t{layer.align.routes} > layer.align.num_experts;
}

GemmProblem problem_of(const GemmLaunch& gemm, const AlignParams& align) {
  const GemmParams& p = gemm.params;
  const bool gated = p.activation != Activation::kNone;
  return {p.slots,      p.moe_block_size, p.k, gated ? 2 * p.n : p.n, gemm.bits, gated,
          align.routes, align.num_experts};
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

// x's routed rows in act-order, one launch; the GEMM then reads a row of its own for each route.
cudaError_t gather(GemmParams& p, const int* perm, const int* topk_ids, void* gathered, Order order,
                   cudaStream_t stream) {
  GatherParams g = {};
  g.x = static_cast<const uint16_t*>(p.x);
  g.perm = perm;
  g.topk_ids = topk_ids;
  g.gathered = static_cast<uint16_t*>(gathered);
  g.x_stride = p.x_stride;
  g.out_rows = p.out_rows;
  g.slots = static_cast<int>(p.out_rows);
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
  const bool tables = needs_tables(layer);
  for (GemmLaunch* gemm : {&layer.gate_up, &layer.down}) {
    set_routing(gemm->params, layer.align, tables);
    gemm->choice = select_tile(problem_of(*gemm, layer.align), device);
  }
  layer.down.params.x_is_pending = true;
}

cudaError_t launch_moe_ffn(const MoeFfnLaunch& layer, cudaStream_t stream) {
  GemmLaunch gate_up = layer.gate_up, down = layer.down;
  const int* topk_ids = layer.align.topk_ids;
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
  if (status == cudaSuccess && layer.gate_up_perm != nullptr) {
    follow(gather(gate_up.params, layer.gate_up_perm, topk_ids, layer.gathered_x, order, stream));
  }
  if (status == cudaSuccess) follow(launch_gemm(gate_up, order, stream));
  if (status == cudaSuccess && layer.down_perm != nullptr) {
    follow(gather(down.params, layer.down_perm, topk_ids, layer.gathered_hidden, order, stream));
  }
  if (status == cudaSuccess) follow(launch_gemm(down, order, stream));
  if (status == cudaSuccess) {
    follow(launch_combine(layer.combine, down.element, order, stream));
  }
  return status;
}

}  // namespace jax_marlin
