// The dense GEMM for a handful of rows and weights that a GPU reads in a few microseconds:
// Yt = Wt Xt with mma.sync, each warp a slice of K.
//
// What counts is how soon all weights are on their way and how late the last is multiplied. So a
// warp finds its weights in few instructions, asks for them before it waits for x, of which it
// brings its own part, and meets others once more, when all its pieces are done.
#pragma once

#include "multiply.cuh"
#include "skinny_ring.cuh"
#include "skinny_store.cuh"

namespace jax_marlin {

// This warp's slice of all rows. Before the weights, or it waits behind them.
template <class Config>
__device__ __forceinline__ void request_x(const GemmParams& p, const SkinnyWork<Config>& work,
                                          typename Config::Element* to) {
  constexpr int kVector = 8;
  const int at = threadIdx.x % 32 * kVector, end = work.tiles * kTile;
  const auto* from = static_cast<const typename Config::Element*>(p.x) + work.k_tile * kTile;
#pragma unroll 1
  for (int row = 0; row < work.rows; ++row) {
#pragma unroll 1
    for (int k = at; k < end; k += 32 * kVector) ptx::cp_async(to + k, from + k, 16);
    to += work.cut.x_pitch;
    from += p.x_stride;
  }
  ptx::cp_async_commit();
}

template <class Config, bool by_tile>
__device__ __forceinline__ void multiply_slice(const GemmParams& p, const SkinnyWork<Config>& work,
                                               unsigned char* shared) {
  request_x(p, work, work.x(shared));
  SkinnyRing<Config, by_tile> ring(p, work, work.x(shared));
  __syncthreads();  // for the assembler, which moves loads past the wait, but not past a barrier
  ptx::cp_async_wait<0>();
  __syncwarp();
#pragma unroll 1
  for (int piece = 0; piece < work.pieces; ++piece) {
    Accumulator<Config> acc = {};
    ring.begin_piece();
    int left = work.tiles;
    for (; left >= Config::kDepth; left -= Config::kDepth) {  // whole turns, without a branch
      ring.advance();
#pragma unroll
      for (int slot = 0; slot < Config::kDepth; ++slot) {
        ring.take(slot);
        multiply_tile<Config, by_tile>(ring, slot, acc);
      }
      ring.end_turn();
    }
    if (left > 0) {
      ring.advance();
#pragma unroll
      for (int slot = 0; slot < Config::kDepth; ++slot) {
        ring.take(slot);
        if (slot < Config::kDepth - 1 && slot < left) {
          multiply_tile<Config, by_tile>(ring, slot, acc);
        }
      }
    }
    share_slice<Config>(acc, work.rows, work.sums(shared, piece, work.warp));
  }
}

// NOTE: built for sm_90a beside wgmma, and launched nowhere else.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    skinny_gemm(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(16) unsigned char shared[];
  ptx::wait_dependencies();
  const SkinnyWork<Config> work(p);
  if (p.group_size % kTile == 0) {
    multiply_slice<Config, true>(p, work, shared);
  } else {
    multiply_slice<Config, false>(p, work, shared);
  }
  // The next kernel's blocks find no room beside this one's, whose threads take all registers.
  ptx::launch_dependents();
  __syncthreads();
  store_pieces<Config>(p, work, shared);
#endif
}

}  // namespace jax_marlin
