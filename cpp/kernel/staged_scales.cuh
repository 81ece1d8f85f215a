// Scales and zero points beside x in its stages: what a thread copies into each, what a warp reads.
#pragma once

#include "dequant.cuh"
#include "group_of_half.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"

namespace jax_marlin {

constexpr int kScaleVector = 8;  // 16-bit elements of one 16-byte copy

// Vectors of scales of one warp of K in a stage; a thread copies one at most.
template <class Config>
constexpr int kStageScaleVectors = 2 * Config::kChunk * Config::kColumns / kScaleVector;

// Of the weights' columns, one set for each 32 of K.
template <class Config>
class StagedScales {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;
  using Stages = typename SharedStorage<Config>::Stages;
  static constexpr int kHalves = 2 * Config::kChunk;
  static constexpr int kVectors = Config::kColumns / kScaleVector;

 public:
  // expert: of the warp of K whose scales this thread copies.
  __device__ __forceinline__ StagedScales(const GemmParams& p, const WorkTile& tile, int expert)
      : p_(p) {
    const int vector = threadIdx.x % kVectors;
    const int fragment = stack_fragment<Config>(p, tile, vector / 2);
    const int64_t column_tile = static_cast<int64_t>(expert) * p.stack_n_tiles + fragment / 4;
    offset_ =
        column_tile * p.num_groups * kTile + fragment % 4 * kFragment + vector % 2 * kScaleVector;
  }

  // This thread's vector of a stage that starts at K tile `k_tile`; zeros from `end` on.
  __device__ __forceinline__ void request(Stages& stages, int stage, int warp_k, int k_tile,
                                          int end) const {
    const int vector = threadIdx.x % kVectors, half = threadIdx.x / kVectors % kHalves;
    k_tile += half / 2;
    const int group = group_of_half(p_, 2 * k_tile + half % 2);
    const bool valid = k_tile < end;
    const int64_t at = valid ? offset_ + group * kTile : 0;
    ptx::cp_async(&stages.scales[stage][warp_k][half][vector * kScaleVector],
                  static_cast<const Element*>(p_.scales) + at, valid ? 16 : 0);
    if constexpr (Config::kStoredZeroPoints) {
      ptx::cp_async(&stages.zero_points[stage][warp_k][half][vector * kScaleVector],
                    static_cast<const Element*>(p_.zero_points) + at, valid ? 16 : 0);
    }
  }

  // Scales of rows n = g and g + 8 of a warp's fragment f.
  static __device__ __forceinline__ GroupScale<Config> load(const Stages& stages, int stage, int f,
                                                            int slot, int half) {
    const int j = slot % Config::kChunk;
    const int warp_n = threadIdx.x / 32 % Config::kWarpsN;
    const int warp_k = threadIdx.x / 32 / Config::kWarpsN;
    // Column 16w + 8b + g of a tile is stored at 16w + 2g + b: the two rows are neighbours.
    const int at = kFragment * (warp_n * Config::kFragsN + f) + 2 * (threadIdx.x % 32 / 4);
    const Pair scales =
        *reinterpret_cast<const Pair*>(&stages.scales[stage][warp_k][2 * j + half][at]);
    if constexpr (Config::kStoredZeroPoints) {
      return GroupScale<Config>(scales, *reinterpret_cast<const Pair*>(
                                            &stages.zero_points[stage][warp_k][2 * j + half][at]));
    } else {
      return GroupScale<Config>(scales);
    }
  }

 private:
  const GemmParams& p_;
  int64_t offset_;  // in scales, of this thread's vector in the expert's first group
};

}  // namespace jax_marlin
