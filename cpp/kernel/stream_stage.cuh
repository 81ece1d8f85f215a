// Operands of one warp that multiplies, in the stage that it has entered: what multiply.cuh asks.
#pragma once

#include "dequant.cuh"
#include "ptx.cuh"
#include "stream_config.cuh"

namespace jax_marlin {

template <class Config>
class StageOperands {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;
  using Storage = StreamStorage<Config>;
  using Stage = typename Storage::Stage;

 public:
  // halves_of_group: of packed K tiles.
  __device__ __forceinline__ StageOperands(int warp, int halves_of_group)
      : fragment_(warp), halves_of_group_(halves_of_group) {}

  __device__ __forceinline__ void begin_piece() { halves_left_ = halves_of_group_; }

  // A stage's scales begin with those of the group that its first half lies in.
  __device__ __forceinline__ void enter(const Stage& stage) {
    const int lane = threadIdx.x % 32;
    weights_ = stage.weights[0][0] + (32 * fragment_ + lane) * 4 * Config::kVectors;
    x_ = ptx::shared_address(&stage.x[lane % 8][lane / 8 * 8]);
    // Column 16w + 8b + g of a tile is stored at 16w + 2g + b: the two rows are neighbours.
    scales_ = stage.scales[0][0][0] + kFragment * fragment_ + lane / 4 * 2;
  }

  __device__ __forceinline__ void load_words(int f, int tile,
                                             uint4 (&words)[Config::kVectors]) const {
    const int tiles = f * Config::kStageTiles + tile;
    const auto* from = reinterpret_cast<const uint4*>(weights_ + tiles * Config::kWordsPerTile);
#pragma unroll
    for (int v = 0; v < Config::kVectors; ++v) words[v] = from[v];
  }

  __device__ __forceinline__ void load_fragment(uint32_t (&b)[4], int m, int tile, int half) const {
    const int at = 8 * m * Config::kXPitch + tile * kTile + half * kHalf;
    ptx::ldmatrix_x4(b, x_ + at * static_cast<int>(sizeof(Element)));
  }

  __device__ __forceinline__ GroupScale<Config> load_scale(int f, int, int) const {
    constexpr int kOfTile = Storage::kHalves * kTile;
    const Element* at = scales_ + f * kOfTile;
    const Pair scales = *reinterpret_cast<const Pair*>(at);
    if constexpr (Config::kStoredZeroPoints) {
      return GroupScale<Config>(scales,
                                *reinterpret_cast<const Pair*>(at + kStreamColumnTiles * kOfTile));
    } else {
      return GroupScale<Config>(scales);
    }
  }

  // `halves` of K are done: perhaps a group.
  __device__ __forceinline__ void end_scale(int halves) {
    halves_left_ -= halves;
    if (halves_left_ > 0) return;
    halves_left_ = halves_of_group_;
    scales_ += kTile;
  }

 private:
  const int fragment_;  // of either column tile
  const int halves_of_group_;
  int halves_left_ = 0;
  const uint32_t* weights_ = nullptr;
  uint32_t x_ = 0;
  const Element* scales_ = nullptr;
};

}  // namespace jax_marlin
