// Float32 accumulators to rows of out: sum over the warps of K, over the blocks of K, scale, store.
// Blocks of K meet in the shared memory of their cluster or, without clusters, in scratch.
// Every sum runs in a fixed order, so the same inputs give the same bits.
#pragma once

#include "activation.cuh"
#include "ptx_sm90.cuh"
#include "scheduler.cuh"

namespace jax_marlin {

template <class Config>
using Accumulator = float[Config::kFragsN][Config::kFragsM][4];

// Accumulators into sums.of[warp_k, token, column].
template <class Config>
__device__ __forceinline__ void share_sums(const Accumulator<Config>& acc, int warp_n, int warp_k,
                                           TileSums<Config>& sums) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int f = 0; f < Config::kFragsN; ++f) {
    const int column = 16 * (warp_n * Config::kFragsN + f) + g;
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      // c[16x8]: rows g, g + 8 are columns of out, columns 2c, 2c + 1 are tokens.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.of[warp_k][8 * m + 2 * c + i % 2][column + 8 * (i / 2)] = acc[f][m][i];
      }
    }
  }
}

__device__ __forceinline__ void add(float4& sum, const float4& part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

// The i-th four columns of the output tile, counted along columns.
template <class Config>
__device__ __forceinline__ float4 sum_warps(const TileSums<Config>& sums, int i) {
  const int m = i / (Config::kColumns / 4), n = i % (Config::kColumns / 4) * 4;
  float4 sum = {};
#pragma unroll
  for (int warp_k = 0; warp_k < Config::kWarpsK; ++warp_k) {
    add(sum, *reinterpret_cast<const float4*>(&sums.of[warp_k][m][n]));
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
  for (int i = threadIdx.x; i < kVectors; i += Config::kThreads) {
    __stcg(part + i, sum_warps<Config>(storage.sums, i));
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
__device__ __forceinline__ float weigh(const GemmParams& p, int expert, float weight,
                                       int stack_column, float value) {
  if (p.weights_before_bias) value *= weight;
  if (p.bias != nullptr) {
    const auto* bias = static_cast<const typename Config::Element*>(p.bias);
    value += Config::to_float(bias[expert * p.bias_stride + stack_column]);
  }
  return p.weights_before_bias ? value : value * weight;
}

// Columns n .. n + 3 of a row; those past p.n are dropped.
template <class Config>
__device__ __forceinline__ void store(const GemmParams& p, int expert, int64_t row, int n,
                                      const float4& sum) {
  using Element = typename Config::Element;
  const bool weighted = !Config::kSumsRoutes && p.topk_weights != nullptr;
  const float weight = weighted ? p.topk_weights[row] : 1.f;
  const int bias_column = n + (p.bias_stride == 0 ? 0 : p.first_tile * kTile);
  const int64_t at = row * p.n + n;
  float values[4] = {sum.x, sum.y, sum.z, sum.w};
  alignas(8) Element narrow[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i < p.n && !Config::kSumsRoutes) {  // routes have been weighed one by one
      values[i] = weigh<Config>(p, expert, weight, bias_column + i, values[i]);
    }
    narrow[i] = Config::from_float(values[i]);
  }
  float* wide_out = static_cast<float*>(p.out) + at;
  Element* out = static_cast<Element*>(p.out) + at;
  if (p.n % 4 == 0) {  // then so is at: one vector
    if (p.out_is_float32)
      *reinterpret_cast<float4*>(wide_out) = {values[0], values[1], values[2], values[3]};
    else
      *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(narrow);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i >= p.n) return;
    if (p.out_is_float32)
      wide_out[i] = values[i];
    else
      out[i] = narrow[i];
  }
}

// Rows of a tile from `sum_of(i)`, its i-th four columns; `shares` blocks take turns of one
// for each thread, and `share` says which.
template <class Config, class SumOf>
__device__ __forceinline__ void store_tile(const GemmParams& p, const WorkTile& tile,
                                           const int* out_row, int share, int shares,
                                           SumOf sum_of) {
  constexpr int kRowVectors = Config::kColumns / 4;
  for (int i = share * Config::kThreads + threadIdx.x; i < Config::kTileM * kRowVectors;
       i += shares * Config::kThreads) {
    const int n = tile.column_block * Config::kColumns + i % kRowVectors * 4;
    const int row = out_row[i / kRowVectors];
    if (row >= 0 && n < p.n) store<Config>(p, tile.expert, row, n, sum_of(i));
  }
}

// Blocks of the cluster take turns to add all parts, in rank order; where one turn takes the whole
// tile, as of 8 rows, the first block does.
template <class Config>
__device__ __forceinline__ void store_cluster(const GemmParams& p, const WorkTile& tile,
                                              SharedStorage<Config>& storage) {
#if __CUDA_ARCH__ >= 900
  TileSums<Config>& sums = storage.sums;
  const auto vector = [&](int i) {
    constexpr int kRowVectors = Config::kColumns / 4;
    return reinterpret_cast<float4*>(&sums.of[0][i / kRowVectors][i % kRowVectors * 4]);
  };
  if constexpr (Config::kWarpsK > 1) {
    for (int i = threadIdx.x; i < Config::kTileM * Config::kColumns / 4; i += Config::kThreads) {
      *vector(i) = sum_warps<Config>(sums, i);
    }
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  store_tile<Config>(p, tile, storage.out_row, tile.split, p.split_k, [&](int i) {
    float4 sum = {};
#pragma unroll 4
    for (int rank = 0; rank < p.split_k; ++rank) add(sum, ptx::load_remote(vector(i), rank));
    return sum;
  });
  __syncwarp();
  ptx::cluster_arrive();  // shared memory must outlive its readers
  ptx::cluster_wait();
#endif
}

// activation(gate, up) of a gated tile, which holds columns of gate, then the same columns of up.
template <class Config>
__device__ __forceinline__ void store_gated(const GemmParams& p, int expert, int column_block,
                                            const int* out_row, const TileSums<Config>& sums) {
  constexpr int kPairs = Config::kColumns / 2;
  for (int i = threadIdx.x; i < Config::kTileM * kPairs; i += Config::kThreads) {
    const int m = i / kPairs, column = i % kPairs;
    const int n = column_block * kPairs + column;
    const int64_t row = out_row[m];
    if (row < 0 || n >= p.n) continue;
    const float weight = p.topk_weights == nullptr ? 1.f : p.topk_weights[row];
    float gate = 0.f, up = 0.f;
#pragma unroll
    for (int warp_k = 0; warp_k < Config::kWarpsK; ++warp_k) {
      gate += sums.of[warp_k][m][column];
      up += sums.of[warp_k][m][column + kPairs];
    }
    gate = weigh<Config>(p, expert, weight, n, gate);
    up = weigh<Config>(p, expert, weight, p.n + n, up);
    static_cast<typename Config::Element*>(p.out)[row * p.n + n] =
        Config::from_float(activate(p.activation, gate, up));
  }
}

template <class Config>
__device__ __forceinline__ void finish(const GemmParams& p, const WorkTile& tile,
                                       const Accumulator<Config>& acc, int warp_n, int warp_k,
                                       SharedStorage<Config>& storage) {
  __syncthreads();  // the stages, whose place the sums take, are still being read
  share_sums<Config>(acc, warp_n, warp_k, storage.sums);
  __syncthreads();
  if (p.activation != Activation::kNone) {
    return store_gated<Config>(p, tile.expert, tile.column_block, storage.out_row, storage.sums);
  }
  if (p.split_k > 1 && p.arrivals == nullptr) return store_cluster<Config>(p, tile, storage);
  if (p.split_k > 1 && !publish_part<Config>(p, tile, storage)) return;
  store_tile<Config>(p, tile, storage.out_row, 0, 1, [&](int i) {
    return p.split_k > 1 ? sum_parts<Config>(p, tile, i) : sum_warps<Config>(storage.sums, i);
  });
}

}  // namespace jax_marlin
