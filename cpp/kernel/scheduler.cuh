// Which piece of the product a thread block computes: dense and routed problems in one place.
#pragma once

#include "params.h"
#include "shared_storage.cuh"
#include "unnamed_rows.cuh"

namespace jax_marlin {

struct WorkTile {
  int64_t index;      // of the output tile
  int expert;
  int column_block;
  int split;          // which part of K
  int k_tile_begin;   // packed K tiles [begin, end) of this part
  int k_tile_end;
};

// What one warp of K multiplies: packed K tiles [begin, end) of an expert.
struct WarpShare {
  int expert, begin, end;
};

// How many warps of K share a product: all of the block's, or, where the tile sums routes, those of
// one route; the warps that remain then have none.
template <class Config>
__device__ __forceinline__ int warps_of_product(const GemmParams& p) {
  return Config::kSumsRoutes ? 1 << p.route_shift : Config::kWarpsK;
}

template <class Config>
__device__ __forceinline__ WarpShare share_of(const GemmParams& p, const WorkTile& tile,
                                              int tiles_per_warp, int warp_k,
                                              const SharedStorage<Config>& storage) {
  if constexpr (Config::kSumsRoutes) {
    const int begin = (warp_k & (warps_of_product<Config>(p) - 1)) * tiles_per_warp;
    const int expert = storage.route_expert[warp_k];
    return {max(expert, 0), begin, expert < 0 ? begin : min(begin + tiles_per_warp, p.k_tiles)};
  } else {
    const int begin = tile.k_tile_begin + warp_k * tiles_per_warp;
    return {tile.expert, begin, min(begin + tiles_per_warp, tile.k_tile_end)};
  }
}

// The stack's column fragment that a block's fragment f is. A gated block takes as many of gate as
// of up, in pairs of the same columns. Past the end the last one is repeated, and never stored.
template <class Config>
__device__ __forceinline__ int stack_fragment(const GemmParams& p, const WorkTile& tile, int f) {
  if (p.activation == Activation::kNone) {
    const int last = (p.n + kFragment - 1) / kFragment - 1;
    return p.first_tile * (kTile / kFragment) +
           min(tile.column_block * Config::kFragments + f, last);
  }
  constexpr int kPairs = Config::kFragments / 2;
  const int of_half = p.n / kFragment;
  const int pair = tile.column_block * kPairs + (f < kPairs ? f : f - kPairs);
  return min(pair, of_half - 1) + (f < kPairs ? 0 : of_half);
}

// Rows of this block into storage.source_row and storage.out_row; the expert, or -1 for no work.
template <class Config>
__device__ __forceinline__ int seek_rows(const GemmParams& p, int row_block,
                                         SharedStorage<Config>& storage) {
  const int i = threadIdx.x;
  if (p.topk_ids != nullptr) {  // few routes: each is a block of its own, and nothing is sorted
    if (i < Config::kTileM) {
      storage.source_row[i] = i == 0 ? row_block / p.row_divisor : -1;
      storage.out_row[i] = i == 0 ? row_block : -1;
    }
    const int expert = p.topk_ids[row_block];
    return expert < p.num_experts ? expert : -1;
  }
  if (p.sorted_token_ids == nullptr) {
    if (i < Config::kTileM) {
      const int64_t row = static_cast<int64_t>(row_block) * Config::kTileM + i;
      storage.source_row[i] = storage.out_row[i] = row < p.out_rows ? static_cast<int>(row) : -1;
    }
    const int expert = p.expert == nullptr ? 0 : *p.expert;
    return min(max(expert, 0), p.num_experts - 1);
  }
  const int routing_block = p.sub_blocks == 1 ? row_block : row_block / p.sub_blocks;
  const int sub_block = row_block - routing_block * p.sub_blocks;
  const int64_t first_slot = static_cast<int64_t>(routing_block) * p.moe_block_size;
  const int expert = p.expert_ids[routing_block];
  const int used_slots = *p.num_tokens_past_padded;
  int id = -1;
  if (i < Config::kTileM) {
    const int within = sub_block * Config::kTileM + i;
    const int64_t slot = first_slot + within;
    if (within < p.moe_block_size && slot < p.slots) id = p.sorted_token_ids[slot];
    if (id < 0 || id >= p.out_rows) id = -1;
    storage.source_row[i] = id < 0 ? -1 : id / p.row_divisor;
    storage.out_row[i] = id;
  }
  if (expert < 0 || expert >= p.num_experts || first_slot >= used_slots) return -1;
  return expert;
}

// A token whose routes are summed: which expert each warp of K takes.
template <class Config>
__device__ __forceinline__ void seek_routes(const GemmParams& p, int token,
                                            SharedStorage<Config>& storage) {
  const int i = threadIdx.x;
  if (i < Config::kTileM) storage.out_row[i] = i == 0 ? token : -1;
  if (i < Config::kWarpsK) {
    const int route = i >> p.route_shift;
    const int id = route < p.routes_of_row ? p.topk_ids[token * p.routes_of_row + route] : -1;
    storage.route_expert[i] = id < p.num_experts ? max(id, -1) : -1;
  }
}

// False when this block has nothing to do; the same answer for all its threads.
template <class Config>
__device__ __forceinline__ bool seek(const GemmParams& p, SharedStorage<Config>& storage,
                                     WorkTile& tile) {
  const int row_block = p.columns_first ? blockIdx.y : blockIdx.x;
  tile.split = blockIdx.z;
  tile.column_block = p.columns_first ? blockIdx.x : blockIdx.y;
  tile.index = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int row_blocks = p.columns_first ? gridDim.y : gridDim.x;
  if (p.zeroes_rows && row_block == row_blocks - 1) {  // the one behind those that multiply
    if (tile.split > 0) return false;
    static_assert(sizeof(NamedRows) <= sizeof(storage.stages), "in their place");
    auto& named = reinterpret_cast<NamedRows&>(storage.stages);
    zero_unnamed_rows(
        p, named, threadIdx.x, Config::kThreads, [] { __syncthreads(); }, 0, 1,
        tile.column_block * Config::kColumns, Config::kColumns);
    return false;
  }
  if constexpr (Config::kSumsRoutes) {
    tile.expert = 0;
    seek_routes<Config>(p, row_block, storage);
  } else {
    tile.expert = seek_rows<Config>(p, row_block, storage);
  }

  const int per_split = (p.k_tiles + p.split_k - 1) / p.split_k;
  tile.k_tile_begin = tile.split * per_split;
  tile.k_tile_end = min(tile.k_tile_begin + per_split, p.k_tiles);

  const bool has_row = threadIdx.x < Config::kTileM && storage.out_row[threadIdx.x] >= 0;
  return __syncthreads_or(has_row && tile.expert >= 0);
}

}  // namespace jax_marlin
