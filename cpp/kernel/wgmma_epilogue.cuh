// Float32 sums of a warpgroup to rows of out: transposed through shared memory in chunks of rows;
// when a cluster splits K, each block adds the parts of all in rank order for its share of rows.
#pragma once

#include "activation.cuh"
#include "params.h"
#include "ptx_sm90.cuh"
#include "wgmma_consumer.cuh"

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
      : p_(p),
        storage_(storage),
        group_(group),
        thread_(threadIdx.x % kWarpgroup),
        rank_(blockIdx.x % p.split_k) {}

  __device__ __forceinline__ void store(const Work& work, const WgmmaSums<Config>& sums) {
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
      store_sums(work, first, n);
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
  __device__ __forceinline__ void sync() { ptx::named_barrier(kGroupBarrier + group_, kWarpgroup); }

  __device__ __forceinline__ void share(const WgmmaSums<Config>& sums, int first) {
    auto& shared = storage_.rest.rows[group_].sums;
    const int c = thread_ % 4, column = thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
#pragma unroll
      for (int m = 0; m < Config::kChunk / 8; ++m) {
        // d[64, n]: rows 16w + g, + 8 are columns of out, columns 8m + 2c, + 1 are tokens.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shared[8 * m + 2 * c + i % 2][kTile * g + column + 8 * (i / 2)] =
              sums[g][first / 2 + 4 * m + i] * Dequant<Config>::kSumScale;
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

  __device__ __forceinline__ void store_sums(const Work& work, int first, int n) {
    if constexpr (Config::kCanGate) {
      if (p_.activation != Activation::kNone) return store_gated_chunk(work, first);
    }
    if (p_.split_k == 1) return store_chunk<false>(work, first, n);
    exchange();
    store_chunk<true>(work, first, n);
  }

  // Rows [first, first + kChunk) of the tile, some at once so as to wait for memory less often.
  // When K is split, row r is summed and stored by the block of rank r % split_k.
  template <bool split>
  __device__ __forceinline__ void store_chunk(const Work& work, int first, int n) {
    constexpr int kPasses = (Config::kChunk + kRowStep - 1) / kRowStep;
    constexpr bool kRoomy = Config::kMultiplyRegisters > 128;
    constexpr int kTogether = kRoomy && !split && kPasses % 2 == 0 ? 2 : 1;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; pass += kTogether) {
      int rows[kTogether];
      float weights[kTogether];
      alignas(16) float values[kTogether][kVector];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int r = (pass + i) * kRowStep + thread_ / kRowVectors;
        const bool own = r < Config::kChunk && n < p_.n && (!split || r % p_.split_k == rank_);
        rows[i] = own ? work.out_row[first + r] : -1;
        if (rows[i] >= 0) load<split>(r, values[i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (rows[i] >= 0)
          weights[i] = work.weight[first + (pass + i) * kRowStep + thread_ / kRowVectors];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (rows[i] >= 0) store_vector(work.expert, rows[i], n, weights[i], values[i]);
      }
    }
  }

  // activation(gate, up) of rows [first, first + kChunk): columns of gate, then the same of up. Two
  // columns a thread: the activation is long, and sums hold most registers.
  __device__ __forceinline__ void store_gated_chunk(const Work& work, int first) {
    constexpr int kPairs = Config::kGroupColumns / 2, kRowThreads = kPairs / 2;
    const int column = thread_ % kRowThreads * 2;
    const int n = (work.column_block * Config::kGroups + group_) * kPairs + column;
    const auto& shared = storage_.rest.rows[group_].sums;
#pragma unroll 1
    for (int r = thread_ / kRowThreads; r < Config::kChunk; r += kWarpgroup / kRowThreads) {
      const int64_t row = work.out_row[first + r];
      if (row < 0 || n >= p_.n) continue;
      const float weight = work.weight[first + r];
      alignas(4) Element narrow[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float gate = weigh(work.expert, n + i, weight, shared[r][column + i]);
        const float up = weigh(work.expert, p_.n + n + i, weight, shared[r][kPairs + column + i]);
        narrow[i] = Config::from_float(activate(p_.activation, gate, up));
      }
      *reinterpret_cast<uint32_t*>(static_cast<Element*>(p_.out) + row * p_.n + n) =
          *reinterpret_cast<const uint32_t*>(narrow);
    }
  }

  // This thread's columns of row r: its own block's sums, or those of all ranks in order.
  template <bool split>
  __device__ __forceinline__ void load(int r, float (&values)[kVector]) const {
    const float4* own = reinterpret_cast<const float4*>(
        &storage_.rest.rows[group_].sums[r][thread_ % kRowVectors * kVector]);
    float4(&sums)[2] = reinterpret_cast<float4(&)[2]>(values);
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] = split ? ptx::load_remote(own + i, 0) : own[i];
#pragma unroll 1
    for (int rank = 1; split && rank < p_.split_k; ++rank) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 part = ptx::load_remote(own + i, rank);
        sums[i].x += part.x;
        sums[i].y += part.y;
        sums[i].z += part.z;
        sums[i].w += part.w;
      }
    }
  }

  // Bias and router weight in float32, then rounded once. Columns past n are dropped.
  __device__ __forceinline__ void store_vector(int expert, int64_t row, int n, float weight,
                                               float (&values)[kVector]) const {
    alignas(16) Element narrow[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (n + i < p_.n) values[i] = weigh(expert, n + i, weight, values[i]);
      narrow[i] = Config::from_float(values[i]);
    }
    const int64_t at = row * p_.n + n;
    float* wide_out = static_cast<float*>(p_.out) + at;
    Element* out = static_cast<Element*>(p_.out) + at;
    if (p_.n % kVector == 0) {
      if (p_.out_is_float32) {
        reinterpret_cast<float4*>(wide_out)[0] = reinterpret_cast<const float4*>(values)[0];
        reinterpret_cast<float4*>(wide_out)[1] = reinterpret_cast<const float4*>(values)[1];
      } else {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(narrow);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (n + i >= p_.n) break;
      if (p_.out_is_float32)
        wide_out[i] = values[i];
      else
        out[i] = narrow[i];
    }
  }

  // n: column of the product.
  __device__ __forceinline__ float weigh(int expert, int n, float weight, float value) const {
    if (p_.weights_before_bias) value *= weight;
    if (p_.bias != nullptr) {
      const int64_t column = p_.bias_stride == 0 ? n : p_.first_tile * kTile + n;
      const auto* bias = static_cast<const Element*>(p_.bias);
      value += Config::to_float(bias[expert * p_.bias_stride + column]);
    }
    return p_.weights_before_bias ? value : value * weight;
  }

  const GemmParams& p_;
  Storage& storage_;
  const int group_, thread_, rank_;
  int chunks_ = 0;  // exchanged so far: which phase the cluster's barriers are in
};

}  // namespace jax_marlin
