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
  static constexpr int kFragmentWords = 32 * 4 * Config::kVectors;

  struct Tile {
    uint4 words[Config::kFragsN][Config::kVectors];
    uint32_t scales[kHalves][Config::kFragsN], zero_points[kHalves][Config::kFragsN];  // pairs
  };

 public:
  // Finds the first piece's weights, in the first expert.
  __device__ __forceinline__ SkinnyRing(const GemmParams& p, const SkinnyWork<Config>& work)
      : p_(p), work_(work), first_tile_(p.first_tile), piece_(work.first) {
    seek();
    if (work.pieces == 0) k_tile_ = work.tiles;  // nothing to request
    ptx::compute_now(words_);
    ptx::compute_now(scales_at_);
    ptx::compute_now(k_tile_);
  }

  // Requests the words of the first turn, most of what comes from memory.
  __device__ __forceinline__ void start(int expert) {
    if (expert > 0) {
      first_tile_ += expert * p_.stack_n_tiles;
      const int k_tile = k_tile_;
      seek();
      k_tile_ = k_tile;
    }
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) request_words(slot);
  }

  // x: the slice, in shared memory.
  __device__ __forceinline__ void begin(const Element* x) {
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) request_scales(slot);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      // Rows past the last are the last once more: their sums are not stored.
      const int row = min(8 * m + lane % 8, work_.rows - 1);
      x_begin_[m] = ptx::shared_address(x + row * work_.cut.x_pitch + lane / 8 * 8);
    }
  }

  __device__ __forceinline__ void begin_piece() { x_at_ = 0; }

  // What is requested from now on lies one turn further, perhaps in the next piece.
  __device__ __forceinline__ void advance() {
    k_tile_ += Config::kDepth;
    if (k_tile_ < work_.tiles) {
      words_ += Config::kDepth * Config::kWordsPerTile;
    } else if (++piece_ < work_.first + work_.pieces) {
      seek();
    }
  }
  __device__ __forceinline__ void end_turn() { x_at_ += Config::kDepth * kTile * 2; }

  // The tile in `slot` becomes the one that is multiplied, and its registers take the one behind it
  // by a turn. Before the products, or it is on its way for so much less time.
  __device__ __forceinline__ void take(int slot) {
    live_ = ring_[slot];
    request_words(slot);
    request_scales(slot);
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
  // To the beginning of the slice in piece_: half a column tile, whose fragments are neighbours.
  __device__ __forceinline__ void seek() {
    static_assert(2 * kSkinnyColumns == kTile);
    const int lane = threadIdx.x % 32, within = piece_ % 2 * Config::kFragsN;
    const int column_tile = first_tile_ + piece_ / 2;
    k_tile_ = 0;
    words_ = p_.qweight +
             (int64_t{column_tile} * p_.k_tiles + work_.k_tile) * Config::kWordsPerTile +
             within * kFragmentWords + lane * 4 * Config::kVectors;
    // Column 16w + 8b + g of a tile is stored at 16w + 2g + b: the two rows are neighbours.
    scales_at_ = int64_t{column_tile} * p_.num_groups * kTile + within * kFragment + lane / 4 * 2;
  }

  __device__ __forceinline__ void request_words(int slot) {
    const bool valid = k_tile_ + slot < work_.tiles;
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
#pragma unroll
      for (int v = 0; v < Config::kVectors; ++v) {
        ptx::load_stream_if(valid,
                            words_ + slot * Config::kWordsPerTile + f * kFragmentWords + 4 * v,
                            ring_[slot].words[f][v]);
      }
    }
  }

  __device__ __forceinline__ void request_scales(int slot) {
    const bool valid = k_tile_ + slot < work_.tiles;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      // Exact while half tiles of K times those of a group are below 2^31.
      const auto index = static_cast<uint32_t>(2 * (work_.k_tile + k_tile_ + slot) + half);
      const auto group = static_cast<int>(__umulhi(2 * index, work_.cut.groups_per_half));
      const int64_t at = scales_at_ + group * kTile;
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) {
        ptx::load_if(valid, static_cast<const Element*>(p_.scales) + at + f * kFragment,
                     ring_[slot].scales[half][f]);
        if constexpr (Config::kStoredZeroPoints) {
          ptx::load_if(valid, static_cast<const Element*>(p_.zero_points) + at + f * kFragment,
                       ring_[slot].zero_points[half][f]);
        }
      }
    }
  }

  const GemmParams& p_;
  const SkinnyWork<Config>& work_;
  uint32_t x_begin_[Config::kFragsM];  // shared addresses of this lane's rows of ldmatrix
  uint32_t x_at_ = 0;  // of the turn that is multiplied, behind them
  int first_tile_;  // of the expert's columns in the stack
  int piece_, k_tile_ = 0;  // that are being requested; k_tile_: of the slice
  const uint32_t* words_;
  int64_t scales_at_;
  Tile ring_[Config::kDepth] = {}, live_;
};

}  // namespace jax_marlin
