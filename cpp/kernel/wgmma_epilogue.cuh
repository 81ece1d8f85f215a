// Float32 sums of a warpgroup to rows of out: transposed through shared memory in chunks of rows;
// when a cluster splits K, each block adds the parts of all in rank order for its share of rows.
#pragma once

#include "ptx_sm90.cuh"
#include "wgmma_consumer.cuh"
#include "params.h"

namespace jax_marlin {

template <class Config>
class WgmmaEpilogue {
  using Element = typename Config::Element;
  using Storage = WgmmaStorage<Config>;
  using Work = typename Storage::Work;
  static constexpr int kVector = 8;  // columns that a thread stores at once
  static constexpr int kRowVectors = Config::kGroupColumns / kVector;
  static constexpr int kRowStep = kWarpgroup / kRowVectors;

 public:
  __device__ __forceinline__ WgmmaEpilogue(const GemmParams& p, Storage& storage, int group)
      : p_(p), storage_(storage), group_(group), thread_(threadIdx.x % kWarpgroup),
        rank_(blockIdx.x % p.split_k) {}

  __device__ __forceinline__ void store(const Work& work, const WgmmaSums<Config>& sums) {
    auto& shared = storage_.rest.sums[group_];
    const int n = work.column_block * Config::kColumns + group_ * Config::kGroupColumns +
                  thread_ % kRowVectors * kVector;
#pragma unroll 1
    for (int first = 0; first < work.rows; first += Config::kChunk) {
      wait_read();
#pragma unroll
      for (int chunk = 0; chunk < Config::kTileM; chunk += Config::kChunk) {
        if (chunk == first) share(sums, chunk);  // registers have no run-time index
      }
      sync();
      if (p_.split_k > 1) exchange();
      // Row r of the chunk is summed and stored by the block of rank r % split_k.
      for (int r = thread_ / kRowVectors * p_.split_k + rank_; r < Config::kChunk;
           r += kRowStep * p_.split_k) {
        const int row = work.out_row[first + r];
        if (row < 0 || n >= p_.n) continue;
        float values[kVector];
        load(&shared[r][thread_ % kRowVectors * kVector], values);
        store_vector(work.expert, row, n, values);
      }
      sync();
      if (p_.split_k > 1 && thread_ < p_.split_k) {
        ptx::mbarrier_arrive_remote(&storage_.rest.parts_read[group_], thread_);
      }
      ++chunks_;
    }
  }

  // Shared memory must outlive its readers in the cluster.
  __device__ __forceinline__ void wait_read() {
    if (p_.split_k > 1 && chunks_ > 0) {
      ptx::mbarrier_wait<true>(&storage_.rest.parts_read[group_], (chunks_ - 1) % 2);
    }
  }

 private:
  __device__ __forceinline__ void sync() { ptx::named_barrier(2 + group_, kWarpgroup); }

  __device__ __forceinline__ void share(const WgmmaSums<Config>& sums, int first) {
    auto& shared = storage_.rest.sums[group_];
    const int c = thread_ % 4, column = thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
#pragma unroll
      for (int m = 0; m < Config::kChunk / 8; ++m) {
        // d[64, n]: rows 16w + g, + 8 are columns of out, columns 8m + 2c, + 1 are tokens.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shared[8 * m + 2 * c + i % 2][kTile * g + column + 8 * (i / 2)] =
              sums[g][first / 2 + 4 * m + i];
        }
      }
    }
  }

  // The parts of all blocks are readable on return.
  __device__ __forceinline__ void exchange() {
    if (thread_ < p_.split_k) {
      ptx::mbarrier_arrive_remote(&storage_.rest.parts_ready[group_], thread_);
    }
    ptx::mbarrier_wait<true>(&storage_.rest.parts_ready[group_], chunks_ % 2);
  }

  __device__ __forceinline__ void load(const float* shared, float (&values)[kVector]) const {
    const float4* own = reinterpret_cast<const float4*>(shared);
    float4 sum[2] = {own[0], own[1]};
    if (p_.split_k > 1) {
      sum[0] = ptx::load_remote(own, 0);
      sum[1] = ptx::load_remote(own + 1, 0);
      for (int rank = 1; rank < p_.split_k; ++rank) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 part = ptx::load_remote(own + i, rank);
          sum[i].x += part.x;
          sum[i].y += part.y;
          sum[i].z += part.z;
          sum[i].w += part.w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values[4 * i] = sum[i].x;
      values[4 * i + 1] = sum[i].y;
      values[4 * i + 2] = sum[i].z;
      values[4 * i + 3] = sum[i].w;
    }
  }

  // Bias and router weight in float32, then rounded once. Columns past n are dropped.
  __device__ __forceinline__ void store_vector(int expert, int64_t row, int n,
                                               float (&values)[kVector]) const {
    const float weight = p_.topk_weights == nullptr ? 1.f : p_.topk_weights[row];
    const int columns = min(p_.n - n, kVector);
    if (p_.weights_before_bias) scale(values, weight);
    if (p_.bias != nullptr) {
      const int64_t stack_column = p_.bias_stride == 0 ? n : p_.first_tile * kTile + n;
      const Element* bias =
          static_cast<const Element*>(p_.bias) + expert * p_.bias_stride + stack_column;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < columns) values[i] += Config::to_float(bias[i]);
      }
    }
    if (!p_.weights_before_bias) scale(values, weight);

    alignas(16) Element narrow[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) narrow[i] = Config::from_float(values[i]);
    const int64_t at = row * p_.n + n;
    float* wide_out = static_cast<float*>(p_.out) + at;
    Element* out = static_cast<Element*>(p_.out) + at;
    if (p_.n % kVector == 0) {
      if (p_.out_is_float32) {
        reinterpret_cast<float4*>(wide_out)[0] = *reinterpret_cast<const float4*>(values);
        reinterpret_cast<float4*>(wide_out)[1] = *reinterpret_cast<const float4*>(values + 4);
      } else {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(narrow);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= columns) break;
      if (p_.out_is_float32)
        wide_out[i] = values[i];
      else
        out[i] = narrow[i];
    }
  }

  static __device__ __forceinline__ void scale(float (&values)[kVector], float weight) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= weight;
  }

  const GemmParams& p_;
  Storage& storage_;
  const int group_, thread_, rank_;
  int chunks_ = 0;  // exchanged so far: which phase the cluster's barriers are in
};

}  // namespace jax_marlin
