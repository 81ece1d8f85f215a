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

__device__ __forceinline__ void add(float4& sum, const float4& part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

// The i-th four columns of the output tile, counted along columns.
template <class Config>
__device__ __forceinline__ float4 sum_warps(const SharedStorage<Config>& storage, int i) {
  const int m = i / (Config::kColumns / 4), n = i % (Config::kColumns / 4) * 4;
  float4 sum = {};
#pragma unroll
  for (int warp_k = 0; warp_k < Config::kWarpsK; ++warp_k) {
    add(sum, *reinterpret_cast<const float4*>(&storage.partial[warp_k][m][n]));
  }
  return sum;
}

// Writes this block's part to scratch. True for the block that arrives last and must sum them all.
template <class Config>
__device__ __forceinline__ bool publish_part(const GemmParams& p, const WorkTile& tile,
                                             SharedStorage<Config>& storage) {
  constexpr int kVectors = Config::kTileM * Config::kColumns / 4;
  float4* part =
      reinterpret_cast<float4*>(p.partials) + (tile.index * p.split_k + tile.split) * kVectors;
  for (int i = threadIdx.x; i < kVectors; i += kThreads)
    __stcg(part + i, sum_warps<Config>(storage, i));
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
__device__ __forceinline__ float4 sum_parts(const GemmParams& p, const WorkTile& tile, int i) {
  constexpr int kVectors = Config::kTileM * Config::kColumns / 4;
  const float4* part =
      reinterpret_cast<const float4*>(p.partials) + tile.index * p.split_k * kVectors + i;
  float4 sum = {};
#pragma unroll 4
  for (int split = 0; split < p.split_k; ++split) add(sum, __ldcg(part + split * kVectors));
  return sum;
}

template <class Config>
__device__ __forceinline__ float apply(const GemmParams& p, const WorkTile& tile, float weight,
                                       int n, float value) {
  if (p.weights_before_bias) value *= weight;
  if (p.bias != nullptr) {
    const int64_t stack_column = p.bias_stride == 0 ? n : p.first_tile * kTile + n;
    const auto* bias = static_cast<const typename Config::Element*>(p.bias);
    value += Config::to_float(bias[tile.expert * p.bias_stride + stack_column]);
  }
  return p.weights_before_bias ? value : value * weight;
}

// Columns n .. n + 3 of a row; those past p.n are dropped.
template <class Config>
__device__ __forceinline__ void store(const GemmParams& p, const WorkTile& tile, int64_t row, int n,
                                      const float4& sum) {
  using Element = typename Config::Element;
  const float weight = p.topk_weights == nullptr ? 1.f : p.topk_weights[row];
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  const int64_t at = row * p.n + n;
  union {
    Element narrow[4];
    uint2 bits;
  } values;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i >= p.n) return;
    const float value = apply<Config>(p, tile, weight, n + i, sums[i]);
    values.narrow[i] = Config::from_float(value);
    if (p.out_is_float32)
      static_cast<float*>(p.out)[at + i] = value;
    else if (p.n % 4 != 0)
      static_cast<Element*>(p.out)[at + i] = values.narrow[i];
  }
  if (!p.out_is_float32 && p.n % 4 == 0) {
    *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + at) = values.bits;
  }
}

template <class Config>
__device__ __forceinline__ void finish(const GemmParams& p, const WorkTile& tile,
                                       const Accumulator<Config>& acc, int warp_n, int warp_k,
                                       SharedStorage<Config>& storage) {
  share_partials<Config>(acc, warp_n, warp_k, storage);
  if (p.split_k > 1 && !publish_part<Config>(p, tile, storage)) return;
  constexpr int kRowVectors = Config::kColumns / 4;
  for (int i = threadIdx.x; i < Config::kTileM * kRowVectors; i += kThreads) {
    const int n = tile.column_block * Config::kColumns + i % kRowVectors * 4;
    const int row = storage.out_row[i / kRowVectors];
    if (row < 0 || n >= p.n) continue;
    store<Config>(p, tile, row, n,
                  p.split_k > 1 ? sum_parts<Config>(p, tile, i) : sum_warps<Config>(storage, i));
  }
}

}  // namespace jax_marlin
