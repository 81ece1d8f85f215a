// The dense GEMM for few rows and weights that a GPU reads in a few microseconds: Yt = Wt Xt with
// mma.sync, each warp a slice of K.
//
// What counts is how soon all weights are on their way and how late the last is multiplied. So a
// warp finds its weights in few instructions, asks for them before anything else, and meets others
// once, when all its pieces are done. x comes in bulk copies: others would have to be issued as
// fast as L2 serves all multiprocessors, and the weights behind them wait.
#pragma once

#include "multiply.cuh"
#include "skinny_ring.cuh"
#include "skinny_store.cuh"

namespace jax_marlin {

// All rows of a slice, by one of the warps that have it.
template <class Config>
__device__ __forceinline__ void request_x(const GemmParams& p, const SkinnyWork<Config>& work,
                                          unsigned char* shared) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  const int row_bytes = work.tiles * kTile * static_cast<int>(sizeof(Element));
  uint64_t* ready = work.x_ready(shared);
  if (lane == 0) {
    ptx::mbarrier_init(ready, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(ready, work.rows * row_bytes);
  }
  __syncwarp();
  if (row_bytes == 0) return;
  const auto* from = static_cast<const Element*>(p.x) + work.k_tile * kTile;
  for (int row = lane; row < work.rows; row += 32) {
    ptx::bulk_copy(work.x(shared) + row * work.cut.x_pitch, from + row * p.x_stride, row_bytes,
                   ready);
  }
}

template <class Config, bool by_tile>
__device__ __forceinline__ void multiply_slice(const GemmParams& p, const SkinnyWork<Config>& work,
                                               int expert, unsigned char* shared) {
  SkinnyRing<Config, by_tile> ring(p, work, expert);
  if (work.team == 0) request_x(p, work, shared);
  ring.begin(work.x(shared));
  // Barriers of other warps are there. And for the assembler, which moves loads past a wait, but
  // not past this.
  __syncthreads();
  ptx::mbarrier_wait(work.x_ready(shared), 0);
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
    if (piece == 0 && work.cut.parts > 1) ptx::cluster_wait();
    share_slice<Config>(acc, work, shared, piece);
  }
  if (work.pieces == 0 && work.cut.parts > 1) ptx::cluster_wait();
  __syncwarp();
}

// NOTE: built for sm_90a beside wgmma, and launched nowhere else.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    skinny_gemm(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(16) unsigned char shared[];
  const SkinnyWork<Config> work(p);
  const bool parted = work.cut.parts > 1;
  if (parted) ptx::cluster_arrive();  // the other block's shared memory is there
  ptx::wait_dependencies();
  const int expert = p.expert == nullptr ? 0 : min(max(*p.expert, 0), p.num_experts - 1);
  if (p.group_size % kTile == 0) {
    multiply_slice<Config, true>(p, work, expert, shared);
  } else {
    multiply_slice<Config, false>(p, work, expert, shared);
  }
  // The next kernel's blocks find no room beside this one's, whose threads take all registers.
  ptx::launch_dependents();
  if (parted) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  store_pieces<Config>(p, work, shared, expert);
#endif
}

}  // namespace jax_marlin
