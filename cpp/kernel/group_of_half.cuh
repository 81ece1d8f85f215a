// Which group of scales half a packed K tile lies in.
#pragma once

#include "params.h"

namespace jax_marlin {

// floor(half * kHalf / group_size) for half < 2^21, the quotient plus half a step being further
// from an integer than float32 rounds. The last half of K may begin a group too many.
__device__ __forceinline__ int group_of_half(const GemmParams& p, int half) {
  return min(static_cast<int>((half + 0.5f) * p.groups_per_half), p.num_groups - 1);
}

}  // namespace jax_marlin
