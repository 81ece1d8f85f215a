// Routing tables in one launch: ids grouped by expert, ascending, each group padded to a block.
//
// One thread block an expert. Each reads all ids: it counts those of earlier experts, so it knows
// where its expert's slots begin without waiting for another block, and keeps a bit for each that
// is its own. Bits then say the order, whatever the timing. Blocks behind those of the experts
// count all ids and fill what lies behind the used slots.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace jax_marlin {

constexpr int kMaxAlignThreads = 1024;
constexpr int kAlignLoads = 16;  // ids that a thread requests at once

__device__ __forceinline__ int local_expert(const AlignParams& p, int expert) {
  return p.expert_map == nullptr ? expert : p.expert_map[expert];
}

// Sum of `own` over the threads before this one, and `total` over all; needs the whole block.
__device__ __forceinline__ int scan(int own, int& total) {
  __shared__ int warp_sums[kMaxAlignThreads / 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int earlier = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += earlier;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  const int of_warp = lane < blockDim.x / 32 ? warp_sums[lane] : 0;
  total = __reduce_add_sync(0xffffffffu, of_warp);
  const int earlier_warps = __reduce_add_sync(0xffffffffu, lane < warp ? of_warp : 0);
  __syncthreads();
  return earlier_warps + sum - own;
}

// Reads `words` times 32 ids from `begin` on, those of one warp. Bit i of lane j: id 32 j + i is
// `expert`. With kCounts, ids of earlier experts are counted, and all others in the counter of
// `expert`, which nobody reads: cheaper than a branch.
template <bool kCounts>
__device__ __forceinline__ unsigned find_own(const AlignParams& p, unsigned begin, int words,
                                             int expert, int* counts) {
  const int lane = threadIdx.x % 32;
  const unsigned end = min(static_cast<unsigned>(p.routes), begin + 32 * words);
  counts += lane & (p.copies - 1);
  unsigned own = 0;
  for (int first = 0; first < words; first += kAlignLoads) {
    const unsigned i = begin + 32 * first + lane;
    const int left = end - i;  // may be negative
    int ids[kAlignLoads];
#pragma unroll
    for (int j = 0; j < kAlignLoads; ++j) {
      ids[j] = 32 * j < left ? __ldg(p.topk_ids + i + 32 * j) : -1;
    }
#pragma unroll
    for (int j = 0; j < kAlignLoads; ++j) {
      if (first + j >= words) break;
      if (kCounts) {  // unsigned, so that negative ids are of no earlier expert
        const unsigned counter = min(static_cast<unsigned>(ids[j]), static_cast<unsigned>(expert));
        atomicAdd(counts + counter * p.copies, 1);
      }
      const unsigned word = __ballot_sync(0xffffffffu, ids[j] == expert);
      if (lane == first + j) own = word;
    }
  }
  return own;
}

// This thread's part of the slots of all experts before `expert`, each padded to whole blocks.
__device__ __forceinline__ int padded_slots(const AlignParams& p, const int* counts, int expert) {
  int slots = 0;
  for (int e = threadIdx.x; e < expert; e += blockDim.x) {
    int count = 0;
    // Each lane starts at another copy: another bank.
#pragma unroll 8
    for (int copy = 0; copy < p.copies; ++copy) {
      count += counts[e * p.copies + ((copy + threadIdx.x) & (p.copies - 1))];
    }
    if (local_expert(p, e) < 0) continue;
    slots += (count + p.moe_block_size - 1) / p.moe_block_size * p.moe_block_size;
  }
  return slots;
}

// Writes the ids that a warp has found, the first of this lane's word to `slot`: word by word, so
// that lanes write side by side.
__device__ __forceinline__ void place(const AlignParams& p, unsigned own, int slot,
                                      unsigned begin) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned left = __ballot_sync(0xffffffffu, own != 0); left != 0; left &= left - 1) {
    const int j = __ffs(left) - 1;
    const unsigned word = __shfl_sync(0xffffffffu, own, j);
    const int first = __shfl_sync(0xffffffffu, slot, j);
    if ((word >> lane & 1) == 0) continue;
    p.sorted_token_ids[first + __popc(word & ((1u << lane) - 1))] = begin + 32 * j + lane;
  }
}

// [begin, end) of a table becomes `value`; `part` of `parts` blocks does its share.
__device__ __forceinline__ void fill(int* table, unsigned begin, unsigned end, int value,
                                     unsigned part, unsigned parts) {
  for (unsigned i = begin + part * blockDim.x + threadIdx.x; i < end; i += parts * blockDim.x) {
    table[i] = value;
  }
}

static __global__ void __launch_bounds__(kMaxAlignThreads)
    moe_align(const __grid_constant__ AlignParams p) {
  extern __shared__ int counts[];  // [num_experts + 1, copies]
  ptx::launch_dependents();
  const bool behind = blockIdx.x >= p.num_experts;
  const int expert = behind ? p.num_experts : blockIdx.x;
  const int local = behind ? 0 : local_expert(p, expert);
  if (local < 0) return;
  fill(counts, 0, (expert + 1) * p.copies, 0, 0, 1);
  __syncthreads();

  const unsigned routes = p.routes;
  const int words = min(32, (routes + blockDim.x - 1) / blockDim.x);
  const unsigned tile = words * blockDim.x, run = threadIdx.x / 32 * (32 * words);
  unsigned own = 0;
  for (unsigned base = 0; base < routes; base += tile) {
    own = find_own<true>(p, base + run, words, expert, counts);
  }
  __syncthreads();
  int first_slot;
  scan(padded_slots(p, counts, expert), first_slot);
  if (behind) {
    const unsigned part = blockIdx.x - expert, parts = gridDim.x - expert;
    if (part == 0 && threadIdx.x == 0) *p.num_tokens_past_padded = first_slot;
    fill(p.sorted_token_ids, first_slot, p.slots, p.routes, part, parts);
    fill(p.expert_ids, first_slot / p.moe_block_size, p.blocks, -1, part, parts);
    return;
  }

  int end = first_slot;
  for (unsigned base = 0; base < routes; base += tile) {
    // Of more tiles than one, only the last one's bits are still there.
    if (tile < routes) own = find_own<false>(p, base + run, words, expert, counts);
    int found;
    const int slot = end + scan(__popc(own), found);
    place(p, own, slot, base + run);
    end += found;
  }
  const int blocks = (end - first_slot + p.moe_block_size - 1) / p.moe_block_size;
  const int first_block = first_slot / p.moe_block_size;
  fill(p.sorted_token_ids, end, first_slot + blocks * p.moe_block_size, p.routes, 0, 1);
  fill(p.expert_ids, first_block, first_block + blocks, local, 0, 1);
}

}  // namespace jax_marlin
