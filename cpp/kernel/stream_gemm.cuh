// The GEMM for few rows and many weights on sm_90: Yt = Wt Xt with mma.sync, all operands streamed.
//
// Blocks stay for many pieces of work, all of K each. One warp copies, far ahead and across pieces,
// so that memory never waits for a block to begin or end; the warps that multiply have columns of
// their own and meet nobody.
#pragma once

#include "multiply.cuh"
#include "stream_producer.cuh"
#include "stream_stage.cuh"
#include "stream_store.cuh"

namespace jax_marlin {

constexpr int kMultiplyBarrier = 1;  // 0 is __syncthreads

template <class Config>
__device__ __forceinline__ void init_barriers(StreamStorage<Config>& storage) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < StreamStorage<Config>::kStages; ++i) {
      ptx::mbarrier_init(&storage.full[i], 1);
      ptx::mbarrier_init(&storage.empty[i], 32 * kStreamWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// by_tile: both halves of a K tile have the same scale.
template <class Config, bool by_tile>
__device__ __forceinline__ void multiply_stage(StageOperands<Config>& operands, int tiles,
                                               Accumulator<Config>& sums) {
  if (tiles == Config::kStageTiles) {
#pragma unroll
    for (int tile = 0; tile < Config::kStageTiles; ++tile) {
      multiply_tile<Config, by_tile>(operands, tile, sums);
    }
  } else {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) multiply_tile<Config, by_tile>(operands, tile, sums);
  }
}

template <class Config, bool by_tile>
__device__ __forceinline__ void consume(const GemmParams& p, StreamStorage<Config>& storage,
                                        int warp) {
  if (p.zeroes_rows) {  // while the first stage is on its way
    constexpr int kThreads = 32 * kStreamWarps;
    zero_unnamed_rows(
        p, storage.named, threadIdx.x, kThreads,
        [] { ptx::named_barrier(kMultiplyBarrier, kThreads); }, blockIdx.x, gridDim.x, 0, p.n);
  }
  StageOperands<Config> operands(warp, p.group_size / kHalf);
  const StreamStore<Config> out(p, warp);
  RingPosition<StreamStorage<Config>::kStages> at;
  while (true) {
    Accumulator<Config> sums = {};
    StoredPiece<Config> piece;
    operands.begin_piece();
    for (int tiles = p.k_tiles; tiles > 0; tiles -= Config::kStageTiles) {
      ptx::mbarrier_wait(&storage.full[at.slot], at.parity);
      const auto& stage = storage.stages[at.slot];
      if (stage.expert < 0) return;
      operands.enter(stage);
      multiply_stage<Config, by_tile>(operands, min(tiles, Config::kStageTiles), sums);
      if (tiles <= Config::kStageTiles) piece = StoredPiece<Config>(stage);
      ptx::mbarrier_arrive(&storage.empty[at.slot]);
      at.advance();
    }
    if (p.zeros_are_pending) ptx::wait_dependencies();
    out.store(piece, sums);
  }
}

// NOTE: built for sm_90a beside wgmma, and launched nowhere else.
template <class Config>
__global__ void __launch_bounds__(kStreamThreads, Config::kMinBlocks)
    stream_gemm(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char shared[];
  auto& storage = *reinterpret_cast<StreamStorage<Config>*>(shared);
  init_barriers<Config>(storage);
  // What the kernel before this one writes is routing tables, awaited here, or x, awaited by the
  // warp that copies it, or zeros, awaited before the sums leave.
  if (!p.x_is_pending && !p.zeros_are_pending) ptx::wait_dependencies();
  // All blocks run at once: the next kernel's take the room of those that end, or what is left. Not
  // before the tables are there, which it does not wait for.
  ptx::launch_dependents();
  const int warp = threadIdx.x / 32;
  if (warp == kStreamWarps) {
    StreamProducer<Config>(p, storage).run();
  } else if (p.group_size % kTile == 0) {
    consume<Config, true>(p, storage, warp);
  } else {
    consume<Config, false>(p, storage, warp);
  }
#endif
}

}  // namespace jax_marlin
