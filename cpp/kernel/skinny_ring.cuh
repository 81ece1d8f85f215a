// Packed weights and scales of one warp, streamed into a ring of registers across the pieces of its
// team, and the slice of x that they meet: what multiply.cuh asks.
#pragma once

#include "dequant.cuh"
#include "ptx.cuh"
#include "skinny_work.cuh"

namespace jax_marlin {

// by_tile: both halves of a K tile have the same scale.
template <class Config, bool by_tile>
class SkinnyRing {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;
  static constexpr int kHalves = by_tile ? 1 : 2;

  struct Tile {
    uint4 words[Config::kFragsN][Config::kVectors];
    uint32_t scales[kHalves][Config::kFragsN], zero_points[kHalves][Config::kFragsN];  // pairs
  };

 public:
  // x: the slice, in shared memory.
  __device__ __forceinline__ SkinnyRing(const GemmParams& p, const SkinnyWork<Config>& work,
                                        const Element* x)
      : p_(p), work_(work), piece_(work.first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      // Rows past the last are the last once more: their sums are not stored.
      const int row = min(8 * m + lane % 8, work.rows - 1);
      x_begin_[m] = ptx::shared_address(x + row * work.cut.x_pitch + lane / 8 * 8);
    }
    seek();
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) request(slot);
  }

  __device__ __forceinline__ void begin_piece() { x_at_ = 0; }

  // What is requested from now on lies one turn further, perhaps in the next piece.
  __device__ __forceinline__ void advance() {
    k_tile_ += Config::kDepth;
    if (k_tile_ < work_.tiles) {
#pragma unroll
      for (auto& words : words_) words += Config::kDepth * Config::kWordsPerTile;
    } else if (++piece_ < work_.first + work_.pieces) {
      seek();
    }
  }
  __device__ __forceinline__ void end_turn() { x_at_ += Config::kDepth * kTile * 2; }

  // The tile in `slot` becomes the one that is multiplied, and its registers take the one behind it
  // by a turn. Before the products, or it is on its way for so much less time.
  __device__ __forceinline__ void take(int slot) {
    live_ = ring_[slot];
    request(slot);
  }

  __device__ __forceinline__ void load_words(int f, int, uint4 (&words)[Config::kVectors]) const {
#pragma unroll
    for (int v = 0; v < Config::kVectors; ++v) words[v] = live_.words[f][v];
  }
  __device__ __forceinline__ void load_fragment(uint32_t (&b)[4], int m, int slot, int half) const {
    ptx::ldmatrix_x4(b, x_begin_[m] + x_at_ + (slot * kTile + half * kHalf) * 2);
  }
  __device__ __forceinline__ GroupScale<Config> load_scale(int f, int, int half) const {
    const Pair& scales = reinterpret_cast<const Pair&>(live_.scales[half][f]);
    if constexpr (Config::kStoredZeroPoints) {
      return GroupScale<Config>(scales, reinterpret_cast<const Pair&>(live_.zero_points[half][f]));
    } else {
      return GroupScale<Config>(scales);
    }
  }
  __device__ __forceinline__ void end_scale(int) const {}

 private:
  // To the beginning of the slice in piece_.
  __device__ __forceinline__ void seek() {
    const int lane = threadIdx.x % 32, last = ((p_.n + kFragment - 1) >> 4) - 1;
    static_assert(kFragment == 1 << 4);
    k_tile_ = 0;
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
      // Past the end the last one is repeated, and never stored.
      const int fragment = 4 * p_.first_tile + min(Config::kFragsN * piece_ + f, last);
      const int column_tile = work_.expert * p_.stack_n_tiles + (fragment >> 2);
      const int within = fragment & 3;
      words_[f] = p_.qweight +
                  int64_t{column_tile * p_.k_tiles + work_.k_tile} * Config::kWordsPerTile +
                  (32 * within + lane) * 4 * Config::kVectors;
      // Column 16w + 8b + g of a tile is stored at 16w + 2g + b: the two rows are neighbours.
      scales_of_[f] =
          int64_t{column_tile * p_.num_groups} * kTile + (within * kFragment + lane / 4 * 2);
    }
  }

  __device__ __forceinline__ void request(int slot) {
    const bool valid = k_tile_ + slot < work_.tiles;
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
#pragma unroll
      for (int v = 0; v < Config::kVectors; ++v) {
        ptx::load_stream_if(valid, words_[f] + slot * Config::kWordsPerTile + 4 * v,
                            ring_[slot].words[f][v]);
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const auto index = static_cast<uint32_t>(2 * (work_.k_tile + k_tile_ + slot) + half);
      const auto group = static_cast<int>(index * work_.cut.groups_per_half >> 20);
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) {
        const int64_t at = scales_of_[f] + group * kTile;
        ptx::load_if(valid, static_cast<const Element*>(p_.scales) + at,
                     ring_[slot].scales[half][f]);
        if constexpr (Config::kStoredZeroPoints) {
          ptx::load_if(valid, static_cast<const Element*>(p_.zero_points) + at,
                       ring_[slot].zero_points[half][f]);
        }
      }
    }
  }

  const GemmParams& p_;
  const SkinnyWork<Config>& work_;
  uint32_t x_begin_[Config::kFragsM];  // shared addresses of this lane's rows of ldmatrix
  uint32_t x_at_ = 0;  // of the turn that is multiplied, behind them
  int piece_, k_tile_ = 0;  // that are being requested; k_tile_: of the slice
  const uint32_t* words_[Config::kFragsN];
  int64_t scales_of_[Config::kFragsN];
  Tile ring_[Config::kDepth] = {}, live_;
};

}  // namespace jax_marlin
