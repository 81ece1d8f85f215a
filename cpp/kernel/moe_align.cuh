// Routing tables in one launch: ids grouped by expert, ascending, each group padded to a block.
//
// One thread block an expert. Each counts all ids (a histogram in shared memory), so each knows
// where its expert's slots begin without waiting for another block; then it walks the ids in order
// and places its own. Order is that of the ids, whatever the timing.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace jax_marlin {

constexpr int kAlignThreads = 256;

__device__ __forceinline__ int local_expert(const AlignParams& p, int expert) {
  return p.expert_map == nullptr ? expert : p.expert_map[expert];
}

// Slots of the experts [begin, end), each padded to whole blocks; needs all threads of the block.
__device__ __forceinline__ int padded_slots(const AlignParams& p, const int* counts, int begin,
                                            int end, int* sum) {
  __syncthreads();
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  int own = 0;
  for (int e = begin + threadIdx.x; e < end; e += kAlignThreads) {
    own += (counts[e] + p.moe_block_size - 1) / p.moe_block_size * p.moe_block_size;
  }
  if (own != 0) atomicAdd(sum, own);  // integers: the order does not matter
  __syncthreads();
  return *sum;
}

static __global__ void __launch_bounds__(kAlignThreads)
    moe_align(const __grid_constant__ AlignParams p) {
  extern __shared__ int counts[];  // [num_experts]
  __shared__ int sum;
  __shared__ int warp_counts[kAlignThreads / 32];
  ptx::launch_dependents();
  const int expert = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  for (int e = threadIdx.x; e < p.num_experts; e += kAlignThreads) counts[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.routes; i += kAlignThreads) {
    const int e = p.topk_ids[i];
    if (e >= 0 && e < p.num_experts && local_expert(p, e) >= 0) atomicAdd(counts + e, 1);
  }
  const int first_slot = padded_slots(p, counts, 0, expert, &sum);
  const int count = counts[expert];
  const int end_slot = padded_slots(p, counts, expert, expert + 1, &sum) + first_slot;

  // Place this expert's ids in ascending order: rank = earlier tiles + earlier warps + earlier
  // lanes.
  int placed = 0;
  for (int base = 0; count > 0 && base < p.routes; base += kAlignThreads) {
    const int i = base + threadIdx.x;
    const bool mine = i < p.routes && p.topk_ids[i] == expert;
    const unsigned ballot = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();
    int before = placed;
    for (int w = 0; w < kAlignThreads / 32; ++w) {
      before += w < warp ? warp_counts[w] : 0;
      placed += warp_counts[w];
    }
    if (mine) p.sorted_token_ids[first_slot + before + __popc(ballot & ((1u << lane) - 1))] = i;
    __syncthreads();
  }
  for (int slot = first_slot + count + threadIdx.x; slot < end_slot; slot += kAlignThreads) {
    p.sorted_token_ids[slot] = p.routes;
  }
  const int block_end = end_slot / p.moe_block_size;
  for (int b = first_slot / p.moe_block_size + threadIdx.x; b < block_end; b += kAlignThreads) {
    p.expert_ids[b] = local_expert(p, expert);
  }
  // The last expert ends where the used slots end: what lies behind is padding.
  if (expert == p.num_experts - 1) {
    if (threadIdx.x == 0) *p.num_tokens_past_padded = end_slot;
    for (int slot = end_slot + threadIdx.x; slot < p.slots; slot += kAlignThreads) {
      p.sorted_token_ids[slot] = p.routes;
    }
    for (int b = block_end + threadIdx.x; b < p.blocks; b += kAlignThreads) p.expert_ids[b] = -1;
  }
}

}  // namespace jax_marlin
