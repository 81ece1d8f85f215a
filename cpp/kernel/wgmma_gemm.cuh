// The GEMM on Hopper: Yt = Wt Xt with wgmma, for more rows than mma.sync serves well.
//
// Blocks stay for many pieces of work. The first warpgroups copy, the others multiply and store;
// the copies of the next piece run while this one is stored.
#pragma once

#include <type_traits>

#include "wgmma_epilogue.cuh"
#include "wgmma_gated_store.cuh"
#include "wgmma_producer.cuh"
#include "wgmma_row_store.cuh"

namespace jax_marlin {

template <class Config>
__device__ __forceinline__ void init_barriers(const GemmParams& p, WgmmaStorage<Config>& storage) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < WgmmaStorage<Config>::kStages; ++i) {
      ptx::mbarrier_init(&storage.full[i], Config::kCopyThreads + 1);  // + 1: the bulk copies
      ptx::mbarrier_init(&storage.empty[i], 4 * Config::kGroups * p.share_x);  // from each warp
    }
    for (int i = 0; i < kWorkSlots; ++i) {
      ptx::mbarrier_init(&storage.rest.work_full[i], Config::kCopyThreads);
      ptx::mbarrier_init(&storage.rest.work_empty[i], kWarpgroup * Config::kGroups);
    }
    for (int i = 0; i < Config::kGroups; ++i) {
      ptx::mbarrier_init(&storage.rest.parts_ready[i], p.split_k);
      ptx::mbarrier_init(&storage.rest.parts_read[i], p.split_k);
    }
    ptx::fence_mbarrier_init();
  }
  if (p.split_k * p.share_x > 1) {  // no block touches another's barriers before they exist
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}

// Products of the narrowest width that covers `rows`, in a loop of its own; where registers are few
// there are two loops, of all rows and of fewer, the latter with a branch at each batch.
template <class Config, int width = 1>
__device__ __forceinline__ void multiply_rows(Consumer<Config>& consumer, int rows, int stages,
                                              WgmmaSums<Config>& sums) {
  constexpr int kNarrow = Config::kWidths - 1;
  if constexpr (width == Config::kWidths) {
    consumer.template multiply<width, width>(width, stages, sums);
  } else if constexpr (Config::kHasRegisters) {
    if (rows > width * Config::kWidthStep) {
      return multiply_rows<Config, width + 1>(consumer, rows, stages, sums);
    }
    consumer.template multiply<width, width>(width, stages, sums);
  } else {
    if (rows > kNarrow * Config::kWidthStep) {
      return multiply_rows<Config, Config::kWidths>(consumer, rows, stages, sums);
    }
    const int wanted = (rows + Config::kWidthStep - 1) / Config::kWidthStep;
    consumer.template multiply<1, kNarrow>(wanted, stages, sums);
  }
}

template <class Config>
__device__ __forceinline__ void consume(const GemmParams& p, WgmmaStorage<Config>& storage,
                                        int group) {
  Consumer<Config> consumer(p, storage, group);
  WgmmaEpilogue<Config> epilogue(p, storage, group);
  std::conditional_t<Config::kHalfTiles, HalfTileStore<Config>, RowStore<Config>> rows(p, storage,
                                                                                       group);
  const bool whole_rows = RowStore<Config>::serves(p);
  const KRange k = k_range(p);
  const int stages = (k.end - k.begin + Config::kStageTiles - 1) / Config::kStageTiles;
  RingPosition<kWorkSlots> at;
  while (true) {
    ptx::mbarrier_wait(&storage.rest.work_full[at.slot], at.parity);
    const auto& work = storage.rest.work[at.slot];
    if (work.expert < 0) break;
    WgmmaSums<Config> sums = {};
    multiply_rows<Config>(consumer, ptx::uniform(work.rows), stages, sums);
    if (whole_rows) {
      rows.store(work, sums);
    } else {
      epilogue.store(work, sums);
    }
    ptx::mbarrier_arrive(&storage.rest.work_empty[at.slot]);
    at.advance();
  }
  rows.finish();
  epilogue.wait_read();
}

// NOTE: wgmma is sm_90a's alone; for other architectures the body is empty and never launched.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    wgmma_gemm(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<WgmmaStorage<Config>*>(shared);
  init_barriers<Config>(p, storage);
  ptx::wait_dependencies();
  if (threadIdx.x < Config::kCopyThreads) {
    ptx::release_registers<Config::kCopyRegisters>();
    Producer<Config>(p, storage).run();
    ptx::launch_dependents();
  } else {
    ptx::take_registers<Config::kMultiplyRegisters>();
    const int thread = threadIdx.x - Config::kCopyThreads;
    consume<Config>(p, storage, ptx::uniform(thread / kWarpgroup));
  }
  if (p.share_x > 1) {  // others still write here and arrive here
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
#endif
}

}  // namespace jax_marlin
