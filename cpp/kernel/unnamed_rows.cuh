// Rows of out that no slot names are zero. Where slots are few the GEMM finds and zeroes them
// itself, beside its products: no launch before it, for which they would wait.
#pragma once

#include "params.h"

namespace jax_marlin {

// Which rows are named, a bit each.
struct NamedRows {
  uint32_t words[kMaxNamedRows / 32];

  __device__ __forceinline__ bool has(int row) const { return words[row / 32] >> row % 32 & 1; }
};

// Columns [first_column, first_column + columns) of rows first_row, first_row + row_step and so on.
// By `threads` threads, whole warps, that meet in `sync`.
template <class Sync>
__device__ __forceinline__ void zero_unnamed_rows(const GemmParams& p, NamedRows& named, int thread,
                                                  int threads, Sync sync, int first_row,
                                                  int row_step, int first_column, int columns) {
  const int rows = static_cast<int>(p.out_rows);
  for (int i = thread; i < (rows + 31) / 32; i += threads) named.words[i] = 0;
  sync();
  const int used_slots = *p.num_tokens_past_padded;
#pragma unroll 4
  for (int slot = thread; slot < p.slots; slot += threads) {
    const int block = slot / p.moe_block_size;
    const int expert = p.expert_ids[block], id = p.sorted_token_ids[slot];
    const bool runs =
        expert >= 0 && expert < p.num_experts && block * p.moe_block_size < used_slots;
    if (runs && id >= 0 && id < rows) atomicOr(&named.words[id / 32], 1u << id % 32);
  }
  sync();
  const int end = min(first_column + columns, p.n);
  for (int row = first_row + thread / 32 * row_step; row < rows; row += threads / 32 * row_step) {
    if (named.has(row)) continue;
    for (int n = first_column + thread % 32; n < end; n += 32) {
      const int64_t at = int64_t{row} * p.n + n;
      if (p.out_is_float32) {
        static_cast<float*>(p.out)[at] = 0.f;
      } else {
        static_cast<uint16_t*>(p.out)[at] = 0;
      }
    }
  }
}

}  // namespace jax_marlin
