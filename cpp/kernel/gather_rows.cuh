// Act-order of routed rows: each row of x reordered by the permutation of the expert it goes to.
#pragma once

#include "params.h"

namespace jax_marlin {

// One block a slot. Rows that no slot names are left alone: nobody reads them.
static __global__ void gather_rows(const __grid_constant__ GatherParams p) {
  const int64_t slot = blockIdx.x;
  const int expert = p.expert_ids[slot / p.moe_block_size];
  const int id = p.sorted_token_ids[slot];
  // By whole blocks, as the GEMM reads them.
  const int64_t first_slot = slot / p.moe_block_size * p.moe_block_size;
  if (first_slot >= *p.num_tokens_past_padded || expert < 0 || expert >= p.num_experts) return;
  if (id < 0 || id >= p.out_rows) return;
  const int* perm = p.perm + static_cast<int64_t>(expert) * p.k;
  const uint16_t* from = p.x + id / p.row_divisor * p.x_stride;
  uint16_t* to = p.gathered + id * p.x_stride;
  for (int i = threadIdx.x; i < p.k; i += blockDim.x) {
    const int source = perm[i];
    to[i] = source >= 0 && source < p.k ? from[source] : 0;
  }
}

}  // namespace jax_marlin
