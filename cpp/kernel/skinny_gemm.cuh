// The dense GEMM for few rows: Yt = Wt Xt with mma.sync, each warp a slice of K.
//
// What counts is how soon weights are on their way, and how late the last is multiplied. So a warp
// finds its own before the kernel before this one is complete, asks for them in few instructions
// after that, and meets others to add up sums when all its pieces are done. x comes in bulk copies:
// others would have to be issued as fast as L2 serves all multiprocessors, and weights wait behind.
#pragma once

#include "multiply.cuh"
#include "skinny_ring.cuh"
#include "skinny_store.cuh"

namespace jax_marlin {

// All rows of a slice, which one of the warps that have it brings.
template <class Config>
class SliceCopy {
  using Element = typename Config::Element;

 public:
  __device__ __forceinline__ SliceCopy(const SkinnyWork<Config>& work, unsigned char* shared)
      : work_(work),
        shared_(shared),
        row_bytes_(work.tiles * kTile * static_cast<int>(sizeof(Element))) {
    if (work.team > 0) return;
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_init(work.x_ready(shared), 1);
      ptx::fence_mbarrier_init();
      ptx::mbarrier_arrive_expect(work.x_ready(shared), work.rows * row_bytes_);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void start(const GemmParams& p) const {
    if (work_.team > 0 || row_bytes_ == 0) return;
    const auto* from = static_cast<const Element*>(p.x) + work_.k_tile * kTile;
    for (int row = threadIdx.x % 32; row < work_.rows; row += 32) {
      ptx::bulk_copy(work_.x(shared_) + row * work_.cut.x_pitch, from + row * p.x_stride,
                     row_bytes_, work_.x_ready(shared_));
    }
  }

  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait(work_.x_ready(shared_), 0); }

 private:
  const SkinnyWork<Config>& work_;
  unsigned char* const shared_;
  const int row_bytes_;
};

template <class Config, bool by_tile>
__device__ __forceinline__ int multiply_slice(const GemmParams& p, const SkinnyWork<Config>& work,
                                              unsigned char* shared) {
  SkinnyRing<Config, by_tile> ring(p, work);
  const SliceCopy<Config> x(work, shared);
  ptx::wait_dependencies();
  const int expert = p.expert == nullptr ? 0 : min(max(*p.expert, 0), p.num_experts - 1);
  ring.start(expert);
  x.start(p);
  ring.begin(work.x(shared));
  // Barriers of other warps are there. And for the assembler, which moves loads past a wait, but
  // not past this.
  __syncthreads();
  x.wait();
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
  return expert;
}

// NOTE: built for sm_90a beside wgmma, and launched nowhere else.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    skinny_gemm(const __grid_constant__ GemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(16) unsigned char shared[];
  const SkinnyWork<Config> work(p);
  const bool parted = work.cut.parts > 1;
  if (parted) ptx::cluster_arrive_relaxed();  // this block's shared memory is there
  const int expert = p.group_size % kTile == 0 ? multiply_slice<Config, true>(p, work, shared)
                                               : multiply_slice<Config, false>(p, work, shared);
  ptx::launch_dependents();  // whose blocks rarely find room beside this one, and wait for it
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
