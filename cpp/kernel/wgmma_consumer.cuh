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
        second_half_(scales_change_inside(p) ? 1 : 0),
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

  // sums += product over `stages` stages, rows [0, width * kWidthStep) of the tile.
  template <int width>
  __device__ __forceinline__ void multiply(int stages, WgmmaSums<Config>& sums) {
    if (stages == 0) return;
    if (Config::kStaggered && group_ == 1 && stages_to_lead_ > 0) {
      stages_to_lead_ = 0;
      ptx::named_barrier(kStaggerBarrier, 2 * kWarpgroup);
    }
    Operands operands;
    load(operands, false);
    bool ready = false;  // the next stage is known to be full
    int read = -1;  // slot of the stage that products still read
    for (int i = 0; i < stages; ++i) {
      const uint32_t x = ptx::shared_address(storage_.stages[at_.slot].x);
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        uint32_t a[Config::kBatch][Config::kGroupTiles][4];
        dequantize_batch(operands, batch, a);
        ptx::wgmma_fence();
        issue<width>(a, batch, x, sums);
        ptx::wgmma_commit();
        if (batch == kBatches - 1) {
          const int slot = at_.slot;
          at_.advance();
          if (Config::kStaggered && group_ == 0 && stages_to_lead_ > 0 && --stages_to_lead_ == 0) {
            ptx::named_barrier_arrive(kStaggerBarrier, 2 * kWarpgroup);
          }
          // While the tensor cores are busy, what the next stage dequantizes arrives.
          if (i + 1 < stages) load(operands, ready);
          ptx::wgmma_wait<1>();
          read = slot;
        } else {
          if (batch == kBatches - 2 && i + 1 < stages) {
            RingPosition<Storage::kStages> next = at_;
            next.advance();
            ready = ptx::mbarrier_try_wait(&storage_.full[next.slot], next.parity);
          }
          ptx::wgmma_wait<1>();
          if (batch == 0 && read >= 0) release(read);
        }
      }
    }
    ptx::wgmma_wait<0>();
    release(read);
    if (Config::kStaggered && group_ == 0 && stages_to_lead_ > 0) {  // K was short
      stages_to_lead_ = 0;
      ptx::named_barrier_arrive(kStaggerBarrier, 2 * kWarpgroup);
    }
  }

 private:
  static constexpr int kBatches = 4 * Config::kStageTiles / Config::kBatch;

  // Packed words and scales of a stage, this thread's alone.
  struct Operands {
    uint4 words[Config::kStageTiles][Config::kGroupTiles][Config::kVectors];
    Pair scales[Storage::kScaleSets][Storage::kHalves][Config::kGroupTiles];
  };

  // Waits for the stage at at_, unless it is known to be full.
  __device__ __forceinline__ void load(Operands& operands, bool ready) const {
    if (!ready) ptx::mbarrier_wait(&storage_.full[at_.slot], at_.parity);
    if constexpr (!Config::kInBoxes) ptx::fence_proxy_async();  // threads wrote x
    const Stage& stage = storage_.stages[at_.slot];
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
      const int tile = tile_ + g;
#pragma unroll
      for (int t = 0; t < Config::kStageTiles; ++t) {
        const uint4* words = reinterpret_cast<const uint4*>(stage.weights[tile][t]);
#pragma unroll
        for (int v = 0; v < Config::kVectors; ++v) {
          operands.words[t][g][v] = words[word_thread_ * Config::kVectors + v];
        }
      }
      // Rows g and g + 8 of this warp's 16 columns are neighbours in the layout.
      const int at = kTile * tile + word_thread_ / 32 * 16 + thread_ % 32 / 4 * 2;
#pragma unroll
      for (int set = 0; set < Storage::kScaleSets; ++set) {
#pragma unroll
        for (int half = 0; half < Storage::kHalves; ++half) {
          const int row = half % 2 == 0 ? half : half - 1 + second_half_;
          operands.scales[set][half][g] =
              *reinterpret_cast<const Pair*>(&stage.scales[set][row][at]);
        }
      }
    }
  }

  __device__ __forceinline__ void dequantize_batch(
      const Operands& operands, int batch,
      uint32_t (&a)[Config::kBatch][Config::kGroupTiles][4]) const {
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
#pragma unroll
      for (int s = 0; s < Config::kBatch; ++s) {
        const int step = batch * Config::kBatch + s;
        const int half = step / 2;
        uint32_t w[Config::kStepWords];
#pragma unroll
        for (int i = 0; i < Config::kStepWords; ++i) {
          const int at = step % 4 * Config::kStepWords + i;
          const uint4& v = operands.words[step / 4][g][at / 4];
          w[i] = at % 4 == 0 ? v.x : at % 4 == 1 ? v.y : at % 4 == 2 ? v.z : v.w;
        }
        Pair zero_points;
        if constexpr (Config::kStoredZeroPoints) {
          zero_points = operands.scales[1][half][g];
        } else {
          zero_points = Config::twice(Config::from_float(Config::kSymmetricZeroPoint));
        }
        const GroupScale<Config> scale(operands.scales[0][half][g], zero_points);
        dequantize<Config>(w, scale, a[s][g]);
      }
    }
  }

  template <int width>
  __device__ __forceinline__ void issue(const uint32_t (&a)[Config::kBatch][Config::kGroupTiles][4],
                                        int batch, uint32_t x, WgmmaSums<Config>& sums) const {
    constexpr int kTileBytes = sizeof(Stage::x[0]);
#pragma unroll
    for (int s = 0; s < Config::kBatch; ++s) {
      const int step = batch * Config::kBatch + s;
      const uint64_t b = ptx::swizzled_descriptor(x + step / 4 * kTileBytes) + step % 4 * 2;
#pragma unroll
      for (int g = 0; g < Config::kGroupTiles; ++g) {
        ptx::wgmma_m64k16(sums[g], a[s][g], b, ptx::Width<width * Config::kWidthStep>{},
                          typename Config::Element{});
      }
    }
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
  const int second_half_;  // 1 when a tile's last 32 of K have scales of their own
  const int share_x_;   // blocks that write into this one's stages, and it into theirs
  int tile_;            // first column tile whose weights this warp multiplies
  int word_thread_;     // thread of the packed tile whose words this one takes
  uint32_t peer_empty_ = 0;  // barriers of the other block that this thread reports to
  int stages_to_lead_ = Storage::kLead;  // staggered: until the second warpgroup may start
  RingPosition<Storage::kStages> at_;
};

}  // namespace jax_marlin
