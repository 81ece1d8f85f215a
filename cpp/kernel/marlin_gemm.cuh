// The GEMM: Yt = Wt Xt, packed weights as operand A from registers, tokens as operand B.
// Dense and routed, 4 and 8 bit, any M: one kernel. Legend: n = output column, m = token,
// f = 16-column fragment of a warp, j = packed K tile of a chunk, half = 32 of its 64 K.
#pragma once

#include "activation_ring.cuh"
#include "multiply.cuh"
#include "resident_activations.cuh"
#include "route_terms.cuh"
#include "transposed_weights.cuh"
#include "weight_ring.cuh"

namespace jax_marlin {

// Operands of one warp; `slot` is where the weight ring holds a tile. X: activations and scales.
template <class Config, class X>
struct WarpOperands {
  X& x;
  const WeightRing<Config>& weights;

  __device__ __forceinline__ void load_words(int f, int slot,
                                             uint4 (&words)[Config::kVectors]) const {
    weights.load(f, slot, words);
  }
  __device__ __forceinline__ void load_fragment(uint32_t (&b)[4], int m, int slot, int half) const {
    x.load_fragment(b, m, slot, half);
  }
  __device__ __forceinline__ GroupScale<Config> load_scale(int f, int slot, int half) const {
    return x.load_scale(f, slot, half);
  }
  __device__ __forceinline__ void end_scale(int halves) const { x.end_scale(halves); }
};

template <class Config>
using Weights =
    std::conditional_t<Config::kTransposed, TransposedWeightRing<Config>, WeightRing<Config>>;

// All K tiles of one warp. by_tile: both halves of a tile have the same scale.
template <class Config, bool by_tile>
__device__ __forceinline__ void multiply_tiles(ActivationRing<Config>& x, Weights<Config>& weights,
                                               int tiles, Accumulator<Config>& acc) {
  for (int k_tile = 0; k_tile < tiles; k_tile += Config::kDepth) {
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) {
      if (slot % Config::kChunk == 0) {
        if (k_tile + slot >= tiles) break;
        x.advance();
      }
      if constexpr (Config::kTransposed) {
        multiply_transposed<Config>(x, weights, slot, acc);
      } else {
        const WarpOperands<Config, ActivationRing<Config>> operands = {x, weights};
        multiply_tile<Config, by_tile>(operands, slot, acc);
      }
      weights.request(slot);
    }
    weights.advance();
  }
}

// The same without stages: warps meet at nothing, and each ends where its own share does.
template <class Config, bool by_tile>
__device__ __forceinline__ void multiply_tiles(ResidentActivations<Config>& x,
                                               WeightRing<Config>& weights, int tiles,
                                               Accumulator<Config>& acc) {
  const WarpOperands<Config, ResidentActivations<Config>> operands = {x, weights};
  x.wait();
  // Whole turns without a branch, so that what the tiles of one wait for overlaps.
  for (; tiles >= Config::kDepth; tiles -= Config::kDepth) {
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) {
      multiply_tile<Config, by_tile>(operands, slot, acc);
      weights.request(slot);
    }
    x.advance();
    weights.advance();
  }
#pragma unroll
  for (int slot = 0; slot < Config::kDepth - 1; ++slot) {
    if (slot >= tiles) break;
    multiply_tile<Config, by_tile>(operands, slot, acc);
  }
}

// By what codes, or weights, were smaller than they are: dequant.cuh.
template <class Config>
__device__ __forceinline__ void scale_sums(Accumulator<Config>& acc) {
#pragma unroll
  for (auto& fragments : acc) {
#pragma unroll
    for (auto& sums : fragments) {
#pragma unroll
      for (float& sum : sums) sum *= Dequant<Config>::kSumScale;
    }
  }
}

template <class Config, template <class> class X>
__device__ __forceinline__ void run_gemm(const GemmParams& p) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& storage = *reinterpret_cast<SharedStorage<Config>*>(shared);
  X<Config>::init(storage);
  if (p.next_fits_beside) ptx::launch_dependents();
  // What the kernel before this one writes is routing tables, awaited here, or x, awaited below, or
  // zeros, awaited before the sums leave.
  if (!p.x_is_pending && !p.zeros_are_pending) ptx::wait_dependencies();
  WorkTile tile;
  if (!seek<Config>(p, storage, tile)) {
    ptx::wait_dependencies();  // or the kernel after this one would not wait for the one before
    return;
  }

  const int warp = threadIdx.x / 32;
  const int warp_n = warp % Config::kWarpsN, warp_k = warp / Config::kWarpsN;
  const int part = tile.k_tile_end - tile.k_tile_begin;
  const int warps = warps_of_product<Config>(p);
  const int tiles_per_warp = (part + warps - 1) / warps;
  const WarpShare share = share_of<Config>(p, tile, tiles_per_warp, warp_k, storage);

  Weights<Config> weights(p, tile, share, warp_n);
  X<Config> x(p, tile, tiles_per_warp, storage);
  RouteTerms<Config> terms;
  if constexpr (Config::kSumsRoutes) {
    // All but x is an input of the layer, and on its way while the kernel before this one runs.
    x.start_scales();
    weights.start();
    terms.fetch(p, tile, warp_n, warp_k, storage);
    if (p.x_is_pending) ptx::wait_dependencies();
    x.start_x();
  } else {
    if (p.x_is_pending) ptx::wait_dependencies();
    // NOTE: x before the weights: requested after them it waits behind megabytes.
    x.start();
    weights.start();
  }

  const int tiles = x.tiles_of(share);
  Accumulator<Config> acc = {};
  if (Config::kScaleSums && p.group_size % kTile == 0) {
    multiply_tiles<Config, true>(x, weights, tiles, acc);
  } else {
    multiply_tiles<Config, false>(x, weights, tiles, acc);
  }
  // Not earlier, unless the next kernel fits beside all of this one: its blocks would take what
  // room there is, here more and there less.
  ptx::launch_dependents();
  if (p.zeros_are_pending) ptx::wait_dependencies();
  scale_sums<Config>(acc);
  terms.weigh(p, acc);
  finish<Config>(p, tile, acc, warp_n, warp_k, storage);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    marlin_gemm(const __grid_constant__ GemmParams p) {
  run_gemm<Config, ActivationRing>(p);
}

// Bulk copies exist from sm_90 on; for other architectures the body is empty and never launched.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    marlin_gemm_resident(const __grid_constant__ GemmParams p) {
#if __CUDA_ARCH__ >= 900
  run_gemm<Config, ResidentActivations>(p);
#endif
}

}  // namespace jax_marlin
