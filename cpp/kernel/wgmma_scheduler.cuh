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
      : share_(p.share_x),
        n_blocks_((p.n_blocks + p.share_x - 1) / p.share_x),
        row_blocks_(count_row_blocks(p)) {}

  __device__ __forceinline__ int count() const { return row_blocks_ * n_blocks_; }

  __device__ __forceinline__ void seek(int index, int& row_block, int& column_block) const {
    const int band = index / (kBandRows * n_blocks_);
    const int height = min(kBandRows, row_blocks_ - band * kBandRows);
    const int within = index - band * kBandRows * n_blocks_;
    row_block = band * kBandRows + within % height;
    column_block = within / height * share_ + static_cast<int>(blockIdx.x) % share_;
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

  int share_;  // blocks of a cluster take neighbouring columns of the same rows
  int n_blocks_, row_blocks_;
};

// One row block: its expert, and which rows of out are its rows. What it loads is not looked at
// until `checked_*`, so that the caller can do other work meanwhile.
template <class Config>
struct RowBlock {
  const int* ids;  // routed: sorted_token_ids of its rows; null when dense
  int first;       // dense: row of out; routed: slot
  int rows;        // how many to look at

  __device__ __forceinline__ RowBlock(const GemmParams& p, int row_block, int& expert) {
    if (p.sorted_token_ids == nullptr) {
      ids = nullptr;
      first = row_block * Config::kTileM;
      rows = static_cast<int>(min(p.out_rows - first, int64_t{Config::kTileM}));
      expert = p.expert == nullptr ? 0 : *p.expert;
    } else {
      const int routing_block = row_block / p.sub_blocks;
      const int within = (row_block - routing_block * p.sub_blocks) * Config::kTileM;
      first = routing_block * p.moe_block_size + within;
      ids = p.sorted_token_ids + first;
      rows = min(min(p.moe_block_size - within, p.slots - first), Config::kTileM);
      expert = p.expert_ids[routing_block];
    }
  }

  __device__ __forceinline__ int row(int i) const {
    return i >= rows ? -1 : ids == nullptr ? first + i : ids[i];
  }
};

// -1: skip the block.
__device__ __forceinline__ int checked_expert(const GemmParams& p, int expert) {
  if (p.sorted_token_ids == nullptr) return min(max(expert, 0), p.num_experts - 1);
  return expert < p.num_experts ? expert : -1;
}

// -1: padding.
__device__ __forceinline__ int checked_row(const GemmParams& p, int row) {
  return row < p.out_rows ? max(row, -1) : -1;
}

}  // namespace jax_marlin
