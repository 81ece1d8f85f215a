// The structs that cross from host to device, one a kernel.
#pragma once

#include <cstdint>

#include "skinny_tile.h"

namespace jax_marlin {

// What an epilogue makes of the gate and up halves of one row (activation.cuh).
enum class Activation { kNone, kSilu, kGelu, kGeluTanh, kSwigluClamped };

// What the copy engine knows of a matrix in memory (CUDA's CUtensorMap): boxes of it are copied by
// their place.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Rows and slots that a GEMM looks through for those to zero: what a block does in its first
// microseconds.
constexpr int kMaxNamedRows = 1024;
constexpr int kMaxNamedSlots = 2048;

// Yt = Wt Xt for one stack of experts. Sizes are in elements unless named _bytes. For x W^T, k and
// k_tiles are those of the sum, which runs along the weight's N, n is its K, first_tile a tile of
// N.
struct GemmParams {
  // Operands. Pointers that a problem does not have are null.
  const void* x;               // [x_rows, x_stride], columns past k are never read as numbers
  const uint32_t* qweight;     // [num_experts, stack_n_tiles, k_tiles, words_per_tile]
  const void* scales;          // [num_experts, stack_n_tiles, num_groups, 64]
  const void* zero_points;     // same shape as scales; null when symmetric
  const void* bias;            // [n] of this call, or [num_experts, bias_stride]
  const int* expert;           // dense: which one, clamped to the stack; null: the only one
  const int* sorted_token_ids; // routed by tables: [slots]; null otherwise
  const int* expert_ids;       // routed: one a routing block
  const int* num_tokens_past_padded;
  const int* topk_ids;         // routed without tables: [out_rows], a row block for each
  const float* topk_weights;   // [out_rows]; null when rows are not weighted
  void* out;                   // [out_rows, n], or [slots, n] by slot
  float* partials;             // [work tiles, split_k, tile_m, tile columns]; null in clusters
  int* arrivals;               // [work tiles], zero at entry; null in clusters

  int64_t x_stride;
  int64_t out_rows;            // dense: M; routed: tokens * top_k
  int64_t bias_stride;         // 0 when bias is this call's own vector
  int slots;                   // routed: length of sorted_token_ids
  int k, n;                    // reduction; columns of out, half of the stack's when gated
  int num_experts;
  int stack_n_tiles;           // column tiles of the whole stack
  int first_tile;              // column tile where this call starts
  int k_tiles;
  int num_groups, group_size;
  float groups_per_half;       // kHalf / group_size
  int moe_block_size;          // slots of one routing block
  int row_divisor;             // routed: slot id s reads x[s / row_divisor]
  int routes_of_row;           // where the tile sums routes: of topk_ids, to one row of out
  int route_shift;             // and 2^route_shift warps of a block share a route
  int sub_blocks;              // row blocks of one routing block
  int n_blocks;                // blocks along the columns
  int split_k;                 // blocks that share one output tile
  int resident_rows;           // of x that a block holds over all its K; 0: it keeps a ring
  int share_x;                 // wgmma: blocks of a cluster that copy x for each other
  Activation activation;       // of columns j (gate) and n + j (up), rows weighted before it
  bool out_is_float32;
  bool x_by_slot;    // wgmma, routed: row s of x is that of slot s
  bool out_by_slot;  // wgmma, routed: row s of out is that of slot s
  bool columns_first;  // blocks with neighbouring columns run together, not those of rows
  bool x_is_pending;  // the kernel before this one, still running, writes x
  bool zeros_are_pending;  // it zeroes arrivals or out
  bool zeroes_rows;  // routed by tables: rows of out that no slot names, too (unnamed_rows.cuh)
  bool next_fits_beside;  // the kernel after this one has room while this one runs: it starts early
  bool weights_before_bias;  // acc * weight + bias, instead of (acc + bias) * weight
  SkinnyCut skinny;  // the skinny kernel alone
  TensorMap x_boxes;  // wgmma, where rows of x are neighbours: dense, or by slot
};

// Bytes to zero, from an address that is a multiple of 16 (clear.cuh).
struct ClearParams {
  unsigned char* begin;
  int64_t bytes;
};

// Sum of each token's routed rows (combine_topk.cuh).
struct CombineParams {
  const void* rows;  // [tokens * top_k, row_stride], float32 or the type of out
  const int* topk_ids;  // [tokens, top_k]; rows of ids outside the stack count as zero
  void* out;  // [tokens, columns]
  int64_t tokens, row_stride;
  int columns, top_k, num_experts;
  bool rows_are_float32;
};

// Routed rows in act-order, in the order of slots, or in both (gather_rows.cuh).
struct GatherParams {
  const uint16_t* x;  // [x_rows, x_stride]: 16-bit elements are moved, not read
  const int* perm;  // [num_experts, k]; null: as they are
  const int* sorted_token_ids;  // null when topk_ids is given
  const int* expert_ids;
  const int* num_tokens_past_padded;
  const int* topk_ids;  // [out_rows], in place of tables
  uint16_t* gathered;  // [out_rows, x_stride], or [slots, x_stride] by slot
  int64_t x_stride, out_rows;
  int slots, k, num_experts, moe_block_size, row_divisor;
  bool by_slot;
};

// Experts whose counters fit beside the kernel's own in 48 KB, which needs no opt-in.
constexpr int kMaxAlignExperts = 8192;

// Routing tables (moe_align.cuh).
struct AlignParams {
  const int* topk_ids;  // [routes]
  const int* expert_map;  // [num_experts] global to local, -1 = elsewhere; null = identity
  int* sorted_token_ids;  // [slots]
  int* expert_ids;  // [blocks]
  int* num_tokens_past_padded;  // [1]
  int routes, slots, blocks, num_experts, moe_block_size;
  int copies;  // counters of an expert, a power of two up to 32; launch_align sets it
};

}  // namespace jax_marlin
