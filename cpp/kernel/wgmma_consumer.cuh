// A warpgroup that multiplies: packed words to fragments of operand A, wgmma over the rows of x.
//
// wgmma runs on its own: while the batch of k16 steps just issued is in the tensor cores, the next
// is dequantized into other registers.
#pragma once

#include "dequant.cuh"
#include "params.h"
#include "ptx_sm90.cuh"
#include "ptx_wgmma.cuh"
#include "wgmma_config.cuh"

namespace jax_marlin {

// [packed column tile of the warpgroup][4 per 8 tokens]: wgmma's d fragment.
template <class Config>
using WgmmaSums = float[Config::kGroupTiles][Config::kTileM / 2];

template <class Config>
class Consumer {
  using Pair = typename Config::Pair;
  using Storage = WgmmaStorage<Config>;
  using Stage = typename Storage::Stage;

 public:
  // group: this warpgroup's place along the columns.
  __device__ __forceinline__ Consumer(const GemmParams& p, Storage& storage, int group)
      : storage_(storage),
        thread_(threadIdx.x % kWarpgroup),
        group_(group),
        scale_mask_(halves_of_scales<Config>(p) - 1),
        share_x_(p.share_x),
        tile_(group * Config::kGroupTiles),
        word_thread_(thread_) {
    if constexpr (Config::kHalfTiles) {
      // Two warps with 16 columns of gate each, and two with the same of up.
      if (p.activation != Activation::kNone) {
        tile_ = thread_ / 64;
        word_thread_ = 64 * group + thread_ % 64;
      }
    }
    if constexpr (Config::kInBoxes) {
      const int rank = static_cast<int>(blockIdx.x) % share_x_;
      peer_empty_ = ptx::shared_address_of(storage.empty, (rank + thread_ % 32) % share_x_);
    }
  }

  // sums += product over `stages` stages, rows [0, width * kWidthStep) of the tile; a loop for the
  // widths first .. last.
  template <int first, int last>
  __device__ __forceinline__ void multiply(int width, int stages, WgmmaSums<Config>& sums) {
    if (Config::kStaggered && group_ == 1 && stages > 0 && lead_ > 0) {
      lead_ = 0;
      ptx::named_barrier(kStaggerBarrier, 2 * kWarpgroup);
    }
    while (stages > 0) {
      const bool leads = Config::kStaggered && group_ == 0 && lead_ > 0;
      const int part = leads ? min(stages, lead_) : stages;
      multiply_stages<first, last>(width, part, sums);
      stages -= part;
      if (leads) {  // even where K is short
        lead_ = 0;
        ptx::named_barrier_arrive(kStaggerBarrier, 2 * kWarpgroup);
      }
    }
  }

 private:
  using At = RingPosition<Storage::kStages>;
  static constexpr int kTileBatches = 4 / Config::kBatch;  // of a packed K tile
  static constexpr int kBatches = kTileBatches * Config::kStageTiles;

  // Packed words and scales of a K tile, this thread's alone.
  struct Operands {
    uint4 words[Config::kGroupTiles][Config::kVectors];
    Pair scales[Storage::kScaleSets][2][Config::kGroupTiles];  // of its halves
  };
  using Scales = GroupScale<Config>[Config::kGroupTiles];

  template <int first, int last>
  __device__ __forceinline__ void multiply_stages(int width, int stages, WgmmaSums<Config>& sums) {
    Operands operands;
    Scales scales;
    await(at_);
    load(operands, at_.slot, 0);
    bool ready = false;  // the next stage is known to be full
    int read = -1;       // slot of the stage that products still read
    for (int left = stages; left > 0; --left) {
      const uint32_t x = ptx::shared_address(storage_.stages[at_.slot].x);
      At next = at_;
      next.advance();
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        uint32_t a[Config::kBatch][Config::kGroupTiles][4];
        dequantize_batch(operands, batch, scales, a);
        issue<first, last>(width, a, batch, x, sums);
        if (batch == kBatches - 1) {
          read = at_.slot;
          at_ = next;
          // While the tensor cores are busy, what the next tile dequantizes arrives.
          if (left > 1) {
            await(next, ready);
            load(operands, next.slot, 0);
          }
        } else if (batch % kTileBatches == kTileBatches - 1) {
          load(operands, at_.slot, batch / kTileBatches + 1);
        }
        if (batch == kBatches - 2 && left > 1) {
          ready = ptx::mbarrier_try_wait(&storage_.full[next.slot], next.parity);
        }
        ptx::wgmma_wait<1>();
        if (batch == 0 && left < stages) release(read);
      }
    }
    ptx::wgmma_wait<0>();
    release(read);
  }

  // Until a stage is full, unless it is known to be.
  __device__ __forceinline__ void await(const At& at, bool ready = false) const {
    if (!ready) ptx::mbarrier_wait(&storage_.full[at.slot], at.parity);
    if constexpr (!Config::kInBoxes) ptx::fence_proxy_async();  // threads wrote x
  }

  // Of K tile `tile` of a full stage.
  __device__ __forceinline__ void load(Operands& operands, int slot, int tile) const {
    const Stage& stage = storage_.stages[slot];
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
      const uint4* words = reinterpret_cast<const uint4*>(stage.weights[tile_ + g][tile]);
#pragma unroll
      for (int v = 0; v < Config::kVectors; ++v) {
        operands.words[g][v] = words[word_thread_ * Config::kVectors + v];
      }
      // Rows g and g + 8 of this warp's 16 columns are neighbours in the layout.
      const int column = kTile * (tile_ + g) + word_thread_ / 32 * 16 + thread_ % 32 / 4 * 2;
#pragma unroll
      for (int set = 0; set < Storage::kScaleSets; ++set) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int half = 2 * tile + h;
          if ((half & scale_mask_) != 0) continue;
          operands.scales[set][h][g] =
              *reinterpret_cast<const Pair*>(&stage.scales[set][half][column]);
        }
      }
    }
  }

  // scales: those of the half tile before, which the next may share.
  __device__ __forceinline__ void dequantize_batch(
      const Operands& operands, int batch, Scales& scales,
      uint32_t (&a)[Config::kBatch][Config::kGroupTiles][4]) const {
#pragma unroll
    for (int s = 0; s < Config::kBatch; ++s) {
      const int step = batch * Config::kBatch + s, half = step / 2;
      if (step % 2 == 0 && (half & scale_mask_) == 0) {
#pragma unroll
        for (int g = 0; g < Config::kGroupTiles; ++g) {
          Pair zero_points = {};
          if constexpr (Config::kStoredZeroPoints) zero_points = operands.scales[1][half % 2][g];
          scales[g] = GroupScale<Config>(operands.scales[0][half % 2][g], zero_points);
        }
      }
#pragma unroll
      for (int g = 0; g < Config::kGroupTiles; ++g) {
        uint32_t w[Config::kStepWords];
#pragma unroll
        for (int i = 0; i < Config::kStepWords; ++i) {
          const int at = step % 4 * Config::kStepWords + i;
          const uint4& v = operands.words[g][at / 4];
          w[i] = at % 4 == 0 ? v.x : at % 4 == 1 ? v.y : at % 4 == 2 ? v.z : v.w;
        }
        dequantize<Config>(w, scales[g], a[s][g]);
      }
    }
  }

  // The batch's products, of the width in first .. last that is wanted.
  template <int first, int last>
  __device__ __forceinline__ void issue(int width,
                                        const uint32_t (&a)[Config::kBatch][Config::kGroupTiles][4],
                                        int batch, uint32_t x, WgmmaSums<Config>& sums) const {
    if constexpr (first < last) {
      if (width > first) return issue<first + 1, last>(width, a, batch, x, sums);
    }
    constexpr int kTileBytes = sizeof(Stage::x[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int s = 0; s < Config::kBatch; ++s) {
      const int step = batch * Config::kBatch + s;
      const uint64_t b = ptx::swizzled_descriptor(x + step / 4 * kTileBytes, step % 4);
#pragma unroll
      for (int g = 0; g < Config::kGroupTiles; ++g) {
        ptx::wgmma_m64k16(sums[g], a[s][g], b, ptx::Width<first * Config::kWidthStep>{},
                          typename Config::Element{});
      }
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void release(int slot) {
    if (thread_ % 32 == 0) ptx::mbarrier_arrive(&storage_.empty[slot]);
    if constexpr (Config::kInBoxes) {
      if (thread_ % 32 > 0 && thread_ % 32 < share_x_) {
        ptx::mbarrier_arrive_cluster(peer_empty_ + slot * static_cast<int>(sizeof(uint64_t)));
      }
    }
  }

  Storage& storage_;
  const int thread_, group_;
  const int scale_mask_;  // half tiles of a stage with none of its bits have scales of their own
  const int share_x_;   // blocks that write into this one's stages, and it into theirs
  int tile_;            // first column tile whose weights this warp multiplies
  int word_thread_;     // thread of the packed tile whose words this one takes
  uint32_t peer_empty_ = 0;  // barriers of the other block that this thread reports to
  int lead_ = Storage::kLead;  // staggered: stages until the second warpgroup may start
  RingPosition<Storage::kStages> at_;
};

}  // namespace jax_marlin
