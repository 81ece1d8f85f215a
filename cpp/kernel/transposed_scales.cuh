// Scales and zero points of x W^T, which change along the sum: a stage holds those of 64 of N for
// each 32 of the block's K.
#pragma once

#include "staged_scales.cuh"

namespace jax_marlin {

// What one thread needs of the live group: columns 2c + l + 8b of one run, l in the two halves.
template <class Config>
struct TransposedScale {
  using Pair = typename Config::Pair;

  PairScale<Config, 0> low;
  PairScale<Config, 1> high;

  __device__ __forceinline__ explicit TransposedScale(const uint2& scales,
                                                      const uint2& zero_points = {})
      : low(of_columns(scales, 0), of_columns(zero_points, 0)),
        high(of_columns(scales, 1), of_columns(zero_points, 1)) {}

 private:
  // Column 8b + g of a run is stored at 2g + b: four neighbours are [l][b].
  static __device__ __forceinline__ Pair of_columns(const uint2& values, int b) {
    const uint32_t pair = __byte_perm(values.x, values.y, b == 0 ? 0x5410 : 0x7632);
    return reinterpret_cast<const Pair&>(pair);
  }
};

// In place of StagedScales.
template <class Config>
class TransposedScales {
  using Element = typename Config::Element;
  using Stages = typename SharedStorage<Config>::Stages;
  static constexpr int kTileElements = 2 * Config::kColumns;  // of one packed tile of the sum
  static constexpr int kTileVectors = kTileElements / kScaleVector;

 public:
  __device__ __forceinline__ TransposedScales(const GemmParams& p, const WorkTile& tile, int expert)
      : p_(p), at_(threadIdx.x % kStageScaleVectors<Config> * kScaleVector) {
    const int of_tile = at_ % kTileElements;
    const int k = tile.column_block * Config::kColumns + of_tile / kTile * kHalf;
    const int group = min(k / p.group_size, p.num_groups - 1);
    const int64_t n_tile = static_cast<int64_t>(expert) * p.stack_n_tiles + p.first_tile;
    offset_ = (n_tile * p.num_groups + group) * kTile + of_tile % kTile;
  }

  __device__ __forceinline__ void request(Stages& stages, int stage, int warp_k, int n_tile,
                                          int end) const {
    n_tile += at_ / kTileElements;
    const bool valid = n_tile < end;
    const int64_t from = valid ? offset_ + int64_t{n_tile} * p_.num_groups * kTile : 0;
    ptx::cp_async(&stages.scales[stage][warp_k][0][0] + at_,
                  static_cast<const Element*>(p_.scales) + from, valid ? 16 : 0);
    if constexpr (Config::kStoredZeroPoints) {
      ptx::cp_async(&stages.zero_points[stage][warp_k][0][0] + at_,
                    static_cast<const Element*>(p_.zero_points) + from, valid ? 16 : 0);
    }
  }

  // Of a warp's fragment f in run `run` of the tile in `slot`.
  static __device__ __forceinline__ TransposedScale<Config> load(const Stages& stages, int stage,
                                                                 int f, int slot, int run) {
    const int warp_n = threadIdx.x / 32 % Config::kWarpsN;
    const int warp_k = threadIdx.x / 32 / Config::kWarpsN;
    const int half = (warp_n * Config::kFragsN + f) * kFragment / kHalf;
    const int at = slot % Config::kChunk * kTileElements + half * kTile + run * kFragment +
                   threadIdx.x % 4 * 4;
    const auto four_at = [at](const Element* elements) {
      return *reinterpret_cast<const uint2*>(elements + at);
    };
    const uint2 scales = four_at(&stages.scales[stage][warp_k][0][0]);
    if constexpr (Config::kStoredZeroPoints) {
      return TransposedScale<Config>(scales, four_at(&stages.zero_points[stage][warp_k][0][0]));
    } else {
      return TransposedScale<Config>(scales);
    }
  }

 private:
  const GemmParams& p_;
  const int at_;    // of this thread's vector in a stage's scales
  int64_t offset_;  // in scales, of this thread's vector in the call's first packed tile
};

}  // namespace jax_marlin
