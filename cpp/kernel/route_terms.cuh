// What makes a warp's sums of a route terms of its token's row of out: router weight and bias.
#pragma once

#include "epilogue.cuh"

namespace jax_marlin {

// Of one warp; of the warps that share a route the first has the bias. Tiles that do not sum routes
// weigh rows when they store them, and have none of this.
template <class Config>
class RouteTerms {
 public:
  __device__ __forceinline__ void fetch(const GemmParams& p, const WorkTile& tile, int warp_n,
                                        int warp_k, const SharedStorage<Config>& storage) {
    if constexpr (Config::kSumsRoutes) {
      const int expert = storage.route_expert[warp_k];
      if (expert < 0) return;  // its sums are zero, and its weight may be anything
      const int route = warp_k >> p.route_shift;
      const int64_t row = int64_t{storage.out_row[0]} * p.routes_of_row + route;
      if (p.topk_weights != nullptr) weight_ = p.topk_weights[row];
      if (p.bias == nullptr || warp_k != route << p.route_shift) return;
      const auto* bias = static_cast<const typename Config::Element*>(p.bias);
#pragma unroll
      for (int i = 0; i < 2 * Config::kFragsN; ++i) {
        const int n = tile.column_block * Config::kColumns + 16 * warp_n * Config::kFragsN + 8 * i +
                      threadIdx.x % 32 / 4;
        if (n < p.n) bias_[i] = Config::to_float(bias[expert * p.bias_stride + n]);
      }
    }
  }

  __device__ __forceinline__ void weigh(const GemmParams& p, Accumulator<Config>& acc) const {
    if constexpr (Config::kSumsRoutes) {
#pragma unroll
      for (int i = 0; i < 4 * Config::kFragsN; ++i) {
        // Rows g and g + 8 of a fragment are columns of out, two tokens of each in a thread.
        float& sum = acc[i / 4][0][i % 4];
        const float bias = bias_[i / 2];
        sum = p.weights_before_bias ? sum * weight_ + bias : (sum + bias) * weight_;
      }
    }
  }

 private:
  float weight_ = 1.f, bias_[2 * Config::kFragsN] = {};
};

}  // namespace jax_marlin
