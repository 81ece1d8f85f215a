// Which pieces of work a block takes, in which order, and which rows are theirs.
#pragma once

#include "params.h"
#include "wgmma_config.cuh"

namespace jax_marlin {

// Blocks that run together share rows of x and columns of weights in L2: the order walks bands of
// this many row blocks, all columns of one band first.
constexpr int kBandRows = 8;

template <class Config>
class WorkOrder {
 public:
  __device__ __forceinline__ explicit WorkOrder(const GemmParams& p)
      : n_blocks_(p.n_blocks), row_blocks_(count_row_blocks(p)) {}

  __device__ __forceinline__ int count() const { return row_blocks_ * n_blocks_; }

  __device__ __forceinline__ void seek(int index, int& row_block, int& column_block) const {
    const int band = index / (kBandRows * n_blocks_);
    const int height = min(kBandRows, row_blocks_ - band * kBandRows);
    const int within = index - band * kBandRows * n_blocks_;
    row_block = band * kBandRows + within % height;
    column_block = within / height;
  }

 private:
  // Routed: those of used slots alone, known on the device.
  static __device__ __forceinline__ int count_row_blocks(const GemmParams& p) {
    if (p.sorted_token_ids == nullptr) {
      return static_cast<int>((p.out_rows + Config::kTileM - 1) / Config::kTileM);
    }
    const int used = min(max(*p.num_tokens_past_padded, 0), p.slots);
    return (used + p.moe_block_size - 1) / p.moe_block_size * p.sub_blocks;
  }

  int n_blocks_, row_blocks_;
};

// The expert of a row block; -1 when it is to be skipped.
__device__ __forceinline__ int block_expert(const GemmParams& p, int row_block) {
  if (p.sorted_token_ids == nullptr) {
    const int expert = p.expert == nullptr ? 0 : *p.expert;
    return min(max(expert, 0), p.num_experts - 1);
  }
  const int expert = p.expert_ids[row_block / p.sub_blocks];
  return expert < p.num_experts ? expert : -1;
}

// Row of out that row i of a row block is; -1 for padding.
template <class Config>
__device__ __forceinline__ int block_row(const GemmParams& p, int row_block, int i) {
  if (p.sorted_token_ids == nullptr) {
    const int64_t row = static_cast<int64_t>(row_block) * Config::kTileM + i;
    return row < p.out_rows ? static_cast<int>(row) : -1;
  }
  const int within = row_block % p.sub_blocks * Config::kTileM + i;
  const int64_t slot = static_cast<int64_t>(row_block / p.sub_blocks) * p.moe_block_size + within;
  if (within >= p.moe_block_size || slot >= p.slots) return -1;
  const int id = p.sorted_token_ids[slot];
  return id < p.out_rows ? max(id, -1) : -1;
}

}  // namespace jax_marlin
