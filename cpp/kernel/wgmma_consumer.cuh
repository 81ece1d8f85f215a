// A warpgroup that multiplies: packed words to fragments of operand A, wgmma over the rows of x.
//
// wgmma runs on its own: while the batch of k16 steps just issued is in the tensor cores, the next
// is dequantized into other registers.
#pragma once

#include "dequant.cuh"
#include "ptx_sm90.cuh"
#include "wgmma_config.cuh"
#include "wgmma_instruction.cuh"

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
  __device__ __forceinline__ Consumer(Storage& storage, int group)
      : storage_(storage), group_(group), thread_(threadIdx.x % kWarpgroup) {}

  // sums += product over `stages` stages, rows [0, width * kWidthStep) of the tile.
  template <int width>
  __device__ __forceinline__ void multiply(int stages, WgmmaSums<Config>& sums) {
    uint64_t* read = nullptr;  // empty barrier of the stage that products still read
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_wait(&storage_.full[at_.slot], at_.parity);
      ptx::fence_proxy_async();
      const Stage& stage = storage_.stages[at_.slot];
#pragma unroll
      for (int t = 0; t < Config::kStageTiles; ++t) {
        const uint64_t x = ptx::swizzled_descriptor(ptx::shared_address(stage.x[t]));
        uint4 words[Config::kGroupTiles][Config::kVectors];
        load_words(stage, t, words);
#pragma unroll
        for (int step = 0; step < 4; step += Config::kBatch) {
          uint32_t a[Config::kBatch][Config::kGroupTiles][4];
          dequantize_batch(stage, t, step, words, a);
          ptx::wgmma_fence();
#pragma unroll
          for (int s = 0; s < Config::kBatch; ++s) {
#pragma unroll
            for (int g = 0; g < Config::kGroupTiles; ++g) {
              ptx::wgmma_m64k16(sums[g], a[s][g], x + 2 * (step + s),
                                ptx::Width<width * Config::kWidthStep>{},
                                typename Config::Element{});
            }
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
          if (t == 0 && step == 0 && read != nullptr) release(read);
        }
      }
      read = &storage_.empty[at_.slot];
      at_.advance();
    }
    ptx::wgmma_wait<0>();
    if (read != nullptr) release(read);
  }

 private:
  __device__ __forceinline__ void release(uint64_t* empty) {
    if (thread_ % 32 == 0) ptx::mbarrier_arrive(empty);
  }

  __device__ __forceinline__ void load_words(
      const Stage& stage, int t, uint4 (&words)[Config::kGroupTiles][Config::kVectors]) const {
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
      const uint32_t* tile = stage.weights[group_ * Config::kGroupTiles + g][t];
#pragma unroll
      for (int v = 0; v < Config::kVectors; ++v) {
        words[g][v] = reinterpret_cast<const uint4*>(tile)[thread_ * Config::kVectors + v];
      }
    }
  }

  // k16 steps [first, first + kBatch) of K tile t.
  __device__ __forceinline__ void dequantize_batch(
      const Stage& stage, int t, int first, const uint4 (&words)[Config::kGroupTiles][Config::kVectors],
      uint32_t (&a)[Config::kBatch][Config::kGroupTiles][4]) const {
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
#pragma unroll
      for (int s = 0; s < Config::kBatch; ++s) {
        const int step = first + s;
        uint32_t w[Config::kStepWords];
#pragma unroll
        for (int i = 0; i < Config::kStepWords; ++i) {
          const int at = step * Config::kStepWords + i;
          const uint4& v = words[g][at / 4];
          w[i] = at % 4 == 0 ? v.x : at % 4 == 1 ? v.y : at % 4 == 2 ? v.z : v.w;
        }
        dequantize<Config>(w, load_scale(stage, 2 * t + step / 2, g), a[s][g]);
      }
    }
  }

  // Scales of this thread's rows g and g + 8 in its warp's 16 columns, neighbours in the layout.
  __device__ __forceinline__ GroupScale<Config> load_scale(const Stage& stage, int half,
                                                           int g) const {
    const int at = kTile * (group_ * Config::kGroupTiles + g) + thread_ / 32 * 16 +
                   thread_ % 32 / 4 * 2;
    const Pair scales = *reinterpret_cast<const Pair*>(&stage.scales[half][at]);
    if constexpr (Config::kStoredZeroPoints) {
      return {scales, *reinterpret_cast<const Pair*>(&stage.zero_points[half][at])};
    } else {
      return {scales, Config::twice(Config::from_float(Config::kSymmetricZeroPoint))};
    }
  }

  Storage& storage_;
  const int group_, thread_;
  RingPosition<Storage::kStages> at_;
};

}  // namespace jax_marlin
