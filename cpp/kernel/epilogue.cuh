// Float32 accumulators to rows of out: sum over the warps of K, over the blocks of K, scale, store.
// Every sum runs in a fixed order, so the same inputs give the same bits.
#pragma once

#include "scheduler.cuh"

namespace jax_marlin {

template <class Config>
using Accumulator = float[Config::kFragsN][Config::kFragsM][4];

// Accumulators into storage.partial [warp_k, token, column]; readable by the block on return.
template <class Config>
__device__ __forceinline__ void share_partials(const Accumulator<Config>& acc, int warp_n,
                                               int warp_k, SharedStorage<Config>& storage) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  __syncthreads();  // the stages are still being read
#pragma unroll
  for (int f = 0; f < Config::kFragsN; ++f) {
    const int column = 16 * (warp_n * Config::kFragsN + f) + g;
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      // c[16x8]: rows g, g + 8 are columns of out, columns 2c, 2c + 1 are tokens.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        storage.partial[warp_k][8 * m + 2 * c + i % 2][column + 8 * (i / 2)] = acc[f][m][i];
      }
    }
  }
  __syncthreads();
}

template <class Config>
__device__ __forceinline__ float sum_warps(const SharedStorage<Config>& storage, int m, int n) {
  float sum = 0.f;
#pragma unroll
  for (int warp_k = 0; warp_k < Config::kWarpsK; ++warp_k) sum += storage.partial[warp_k][m][n];
  return sum;
}

// Writes this block's part to scratch. True for the block that arrives last and must sum them all.
template <class Config>
__device__ __forceinline__ bool publish_part(const GemmParams& p, const WorkTile& tile,
                                             SharedStorage<Config>& storage) {
  constexpr int kElements = Config::kTileM * Config::kColumns;
  float* part = p.partials + (tile.index * p.split_k + tile.split) * kElements;
  for (int i = threadIdx.x; i < kElements; i += kThreads) {
    __stcg(part + i, sum_warps<Config>(storage, i / Config::kColumns, i % Config::kColumns));
  }
  __threadfence();  // the part is visible before the arrival that announces it
  __syncthreads();
  if (threadIdx.x == 0) {
    storage.is_last = atomicAdd(p.arrivals + tile.index, 1) == p.split_k - 1;
    __threadfence();
  }
  __syncthreads();
  return storage.is_last;
}

template <class Config>
__device__ __forceinline__ float sum_parts(const GemmParams& p, const WorkTile& tile, int i) {
  constexpr int kElements = Config::kTileM * Config::kColumns;
  const float* part = p.partials + tile.index * p.split_k * kElements + i;
  float sum = 0.f;
  for (int split = 0; split < p.split_k; ++split) sum += __ldcg(part + split * kElements);
  return sum;
}

template <class Config>
__device__ __forceinline__ void store(const GemmParams& p, const WorkTile& tile, int64_t row, int n,
                                      float value) {
  using Element = typename Config::Element;
  const float weight = p.topk_weights == nullptr ? 1.f : p.topk_weights[row];
  if (p.weights_before_bias) value *= weight;
  if (p.bias != nullptr) {
    const int64_t stack_column = p.bias_stride == 0 ? n : p.first_tile * kTile + n;
    const Element* bias = static_cast<const Element*>(p.bias);
    value += Config::to_float(bias[tile.expert * p.bias_stride + stack_column]);
  }
  if (!p.weights_before_bias) value *= weight;
  const int64_t at = row * p.n + n;
  if (p.out_is_float32)
    static_cast<float*>(p.out)[at] = value;
  else
    static_cast<Element*>(p.out)[at] = Config::from_float(value);
}

template <class Config>
__device__ __forceinline__ void finish(const GemmParams& p, const WorkTile& tile,
                                       const Accumulator<Config>& acc, int warp_n, int warp_k,
                                       SharedStorage<Config>& storage) {
  share_partials<Config>(acc, warp_n, warp_k, storage);
  if (p.split_k > 1 && !publish_part<Config>(p, tile, storage)) return;
  for (int i = threadIdx.x; i < Config::kTileM * Config::kColumns; i += kThreads) {
    const int m = i / Config::kColumns, column = i % Config::kColumns;
    const int n = tile.column_block * Config::kColumns + column;
    const int row = storage.out_row[m];
    if (row < 0 || n >= p.n) continue;
    store<Config>(
        p, tile, row, n,
        p.split_k > 1 ? sum_parts<Config>(p, tile, i) : sum_warps<Config>(storage, m, column));
  }
}

}  // namespace jax_marlin
