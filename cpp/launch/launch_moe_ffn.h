// A whole MoE layer as one sequence of launches: routing tables, gate_up with the activation, down
// with the router weights, the sum over top_k.
#pragma once

#include "launch_gemm.h"

namespace jax_marlin {

struct MoeFfnLaunch {
  // Leaves, sizes and outputs; plan_moe_ffn fills in the routing and the tile choices.
  GemmLaunch gate_up;             // x -> hidden, gated
  GemmLaunch down;                // hidden -> rows, or to out where down sums them
  AlignParams align;
  CombineParams combine;
  const int* gate_up_perm;        // [num_experts, k] act-order, or null
  const int* down_perm;
  void* gathered_x;               // [tokens * top_k, x_stride] where gate_up_perm
  void* gathered_hidden;          // [tokens * top_k, x_stride] where down_perm
  int64_t hidden_rows;            // room in hidden: of slots, or of routes
  int64_t rows_bytes;             // room in rows, which x can take before them
};

// Completes `layer` for `device`, as select_layer says.
void plan_moe_ffn(MoeFfnLaunch& layer, const DeviceLimits& device);
cudaError_t launch_moe_ffn(const MoeFfnLaunch& layer, cudaStream_t stream);

}  // namespace jax_marlin
