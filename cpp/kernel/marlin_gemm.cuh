// The GEMM: Yt = Wt Xt, packed weights as operand A from registers, tokens as operand B.
// Dense and routed, 4 and 8 bit, any M: one kernel. Legend: n = output column, m = token,
// f = 16-column fragment of a warp, j = packed K tile of a chunk, half = 32 of its 64 K.
#pragma once

#include "activation_ring.cuh"
#include "epilogue.cuh"
#include "weight_ring.cuh"

namespace jax_marlin {

// One packed K tile of one warp: 4 k16 steps by kFragsN by kFragsM tensor-core products.
// slot: where the weight ring holds it; j: where the x stage does.
template <class Config>
__device__ __forceinline__ void multiply_tile(const ActivationRing<Config>& x,
                                              const WeightRing<Config>& weights, int slot, int j,
                                              int warp_n, int warp_k, Accumulator<Config>& acc) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[Config::kFragsN][2][4];  // [fragment, k16 step, register]
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
      const auto scale = x.load_scale(warp_k, 16 * (warp_n * Config::kFragsN + f), j, half);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t words[Config::kStepWords];
        weights.words(slot, f, 2 * half + step, words);
        dequantize<Config>(words, scale, a[f][step]);
      }
    }
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      uint32_t b[4];
      x.load_fragment(b, warp_k, m, j, half);
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          ptx::mma_m16n8k16(acc[f][m], a[f][step], b[2 * step], b[2 * step + 1],
                            typename Config::Element{});
        }
      }
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kMinBlocks)
    marlin_gemm(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& storage = *reinterpret_cast<SharedStorage<Config>*>(shared);
  WorkTile tile;
  if (!seek<Config>(p, storage, tile)) return;

  const int warp = threadIdx.x / 32;
  const int warp_n = warp % Config::kWarpsN, warp_k = warp / Config::kWarpsN;
  const int part = tile.k_tile_end - tile.k_tile_begin;
  const int tiles_per_warp = (part + Config::kWarpsK - 1) / Config::kWarpsK;

  // NOTE: x before the weights: requested after them it waits behind megabytes.
  ActivationRing<Config> x(p, tile, tiles_per_warp, storage);
  x.start();
  WeightRing<Config> weights(p, tile, tiles_per_warp, warp_n, warp_k);
#pragma unroll
  for (int slot = 0; slot < Config::kDepth; ++slot) weights.request(slot);
  weights.advance();

  Accumulator<Config> acc = {};
  for (int k_tile = 0; k_tile < tiles_per_warp; k_tile += Config::kDepth) {
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) {
      if (slot % Config::kChunk == 0) {
        if (k_tile + slot >= tiles_per_warp) break;
        x.advance();
      }
      multiply_tile<Config>(x, weights, slot, slot % Config::kChunk, warp_n, warp_k, acc);
      weights.request(slot);
    }
    weights.advance();
  }
  finish<Config>(p, tile, acc, warp_n, warp_k, storage);
}

}  // namespace jax_marlin
