// Rows of x for the routes that read them: reordered by the permutation of the expert they go to
// (act-order), or as they are, in the order of ids or of slots.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace jax_marlin {

struct GatheredRow {
  int64_t id;
  int expert;
};

// The row that a slot names, -1 for none.
__device__ __forceinline__ GatheredRow gathered_row(const GatherParams& p, int64_t slot) {
  if (p.topk_ids != nullptr) return {slot, p.topk_ids[slot]};
  // By whole blocks, as the GEMM reads them.
  const int64_t block = slot / p.moe_block_size;
  if (block * p.moe_block_size >= *p.num_tokens_past_padded) return {-1, -1};
  return {p.sorted_token_ids[slot], p.expert_ids[block]};
}

// One block a slot. Rows that no slot names are left alone: nobody reads them.
static __global__ void gather_rows(const __grid_constant__ GatherParams p) {
  ptx::wait_dependencies();
  ptx::launch_dependents();
  const auto [id, expert] = gathered_row(p, blockIdx.x);
  if (expert < 0 || expert >= p.num_experts || id < 0 || id >= p.out_rows) return;
  const uint16_t* from = p.x + id / p.row_divisor * p.x_stride;
  uint16_t* to = p.gathered + (p.by_slot ? blockIdx.x : id) * p.x_stride;
  if (p.perm == nullptr) {  // rows begin and end at 16 bytes
    const auto* vectors = reinterpret_cast<const uint4*>(from);
    for (int i = threadIdx.x; i < p.x_stride / 8; i += blockDim.x) {
      reinterpret_cast<uint4*>(to)[i] = vectors[i];
    }
    return;
  }
  const int* perm = p.perm + static_cast<int64_t>(expert) * p.k;
  for (int i = threadIdx.x; i < p.k; i += blockDim.x) {
    const int source = perm[i];
    to[i] = source >= 0 && source < p.k ? from[source] : 0;
  }
}

}  // namespace jax_marlin
