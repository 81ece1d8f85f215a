// The warp that copies: weights, scales, zero points and rows of x of one piece of work after the
// other, as far ahead of the products as the ring is long.
//
// Each run of memory is one bulk copy: a column tile's weights over the K of a stage, its scales, a
// row of x. Lane i asks for row i, and for what belongs to column tile i % 2.
#pragma once

#include "group_of_half.cuh"
#include "ptx_sm90.cuh"
#include "stream_config.cuh"

namespace jax_marlin {

template <class Config>
class StreamProducer {
  using Element = typename Config::Element;
  using Storage = StreamStorage<Config>;

  struct Piece {
    int expert;  // -1: skip it
    int column_block;
    int row;  // of out, this lane's; -1 for padding
  };

  // Where this lane's runs of a piece begin.
  struct Sources {
    const uint32_t* weights;
    const Element *scales, *x;
    int rows;  // of all lanes
    bool has_row;
  };

 public:
  __device__ __forceinline__ StreamProducer(const GemmParams& p, Storage& storage)
      : p_(p), storage_(storage), lane_(threadIdx.x % 32), x_is_pending_(p.x_is_pending) {}

  __device__ __forceinline__ void run() {
    // Tables of the first piece are asked for before it is known whether it is in use.
    int index = blockIdx.x;
    Piece next = find(index);
    const int count = count_row_blocks() * p_.n_blocks;
    while (index < count) {
      Piece piece = checked(next);
      index += gridDim.x;
      if (index < count) next = find(index);  // arrives while this one is copied
      const bool has_rows = __any_sync(0xffffffffu, piece.row >= 0);
      if (piece.expert >= 0 && has_rows) copy(piece, sources_of(piece));
    }
    // Or the kernel after this one would not wait for the one before.
    ptx::wait_dependencies();
    wait_empty();
    describe({-1, 0, -1});
    if (lane_ == 0) ptx::mbarrier_arrive(&storage_.full[at_.slot]);
  }

 private:
  // Those of used slots alone, known on the device.
  __device__ __forceinline__ int count_row_blocks() const {
    if (p_.topk_ids != nullptr) return static_cast<int>(p_.out_rows);
    const int used = min(max(*p_.num_tokens_past_padded, 0), p_.slots);
    return (used + p_.moe_block_size - 1) / p_.moe_block_size;
  }

  // Blocks that run together take neighbouring columns of the same rows. What it loads is looked at
  // when it is checked, so that other work can be done meanwhile.
  __device__ __forceinline__ Piece find(int index) const {
    const int row_block = index / p_.n_blocks;
    Piece piece = {0, index - row_block * p_.n_blocks, -1};
    if (p_.topk_ids != nullptr) {  // each route is a row block of its own
      piece.expert = p_.topk_ids[row_block];
      if (lane_ == 0) piece.row = row_block;
    } else {
      piece.expert = p_.expert_ids[row_block];
      const int slot = row_block * p_.moe_block_size + lane_;
      if (lane_ < p_.moe_block_size && slot < p_.slots) piece.row = p_.sorted_token_ids[slot];
    }
    return piece;
  }

  __device__ __forceinline__ Piece checked(Piece piece) const {
    if (piece.expert >= p_.num_experts) piece.expert = -1;
    piece.row = piece.row < p_.out_rows ? max(piece.row, -1) : -1;
    return piece;
  }

  // The stack's column tile that is `tile` of a piece: in gated ones one of gate, one of up. Past
  // the end the last one is repeated, and never stored.
  __device__ __forceinline__ int stack_tile(int column_block, int tile) const {
    if (p_.activation == Activation::kNone) {
      const int last = (p_.n + kTile - 1) / kTile - 1;
      return p_.first_tile + min(column_block * kStreamColumnTiles + tile, last);
    }
    return column_block + tile * (p_.n / kTile);
  }

  __device__ __forceinline__ Sources sources_of(const Piece& piece) const {
    const int tile = lane_ % kStreamColumnTiles, set = lane_ / kStreamColumnTiles;
    const int64_t column_tile = static_cast<int64_t>(piece.expert) * p_.stack_n_tiles +
                                stack_tile(piece.column_block, tile);
    const bool routed = p_.sorted_token_ids != nullptr || p_.topk_ids != nullptr;
    const int64_t row = routed ? max(piece.row, 0) / p_.row_divisor : max(piece.row, 0);
    Sources from;
    from.weights = p_.qweight + column_tile * p_.k_tiles * Config::kWordsPerTile;
    from.scales = static_cast<const Element*>(set == 0 ? p_.scales : p_.zero_points) +
                  column_tile * p_.num_groups * kTile;
    from.x = static_cast<const Element*>(p_.x) + row * p_.x_stride;
    from.has_row = piece.row >= 0;
    from.rows = __popc(__ballot_sync(0xffffffffu, from.has_row));
    return from;
  }

  // All stages of one piece.
  __device__ __forceinline__ void copy(const Piece& piece, const Sources& from) {
    int k_tile = 0;
    if (x_is_pending_) {  // weights fill the ring while the kernel before this one writes x
      for (; k_tile < p_.k_tiles && at_.parity == 0; k_tile += Config::kStageTiles) {
        request_weights(piece, from, k_tile);
        at_.advance();
      }
      ptx::wait_dependencies();
      x_is_pending_ = false;
      for (int slot = 0; slot * Config::kStageTiles < k_tile; ++slot) {
        request_x(from, slot * Config::kStageTiles, slot);
      }
    }
    for (; k_tile < p_.k_tiles; k_tile += Config::kStageTiles) {
      wait_empty();
      request_weights(piece, from, k_tile);
      request_x(from, k_tile, at_.slot);
      at_.advance();
    }
  }

  __device__ __forceinline__ int tiles_from(int k_tile) const {
    return min(p_.k_tiles - k_tile, Config::kStageTiles);
  }

  // Weights, scales and zero points, and word of x, which follows.
  __device__ __forceinline__ void request_weights(const Piece& piece, const Sources& from,
                                                  int k_tile) {
    auto& stage = storage_.stages[at_.slot];
    uint64_t* full = &storage_.full[at_.slot];
    const int tile = lane_ % kStreamColumnTiles, set = lane_ / kStreamColumnTiles;
    const int tiles = tiles_from(k_tile), first_group = group_of_half(p_, 2 * k_tile);
    const int groups = group_of_half(p_, 2 * (k_tile + tiles) - 1) - first_group + 1;
    const int of_weights = tiles * Config::kWordsPerTile * 4;
    const int of_scales = groups * kTile * static_cast<int>(sizeof(Element));
    describe(piece);
    if (lane_ == 0) {
      const int of_tile = of_weights + Storage::kScaleSets * of_scales;
      ptx::mbarrier_arrive_expect(full,
                                  kStreamColumnTiles * of_tile + from.rows * row_bytes(tiles));
    }
    __syncwarp();
    if (set == 0) {
      ptx::bulk_copy(stage.weights[tile], from.weights + k_tile * Config::kWordsPerTile, of_weights,
                     full);
    }
    if (set < Storage::kScaleSets) {
      ptx::bulk_copy(stage.scales[set][tile], from.scales + first_group * kTile, of_scales, full);
    }
  }

  static __device__ __forceinline__ int row_bytes(int tiles) {
    return tiles * kTile * static_cast<int>(sizeof(Element));
  }

  // Rows that are padding keep what was there: only their own sums depend on it.
  __device__ __forceinline__ void request_x(const Sources& from, int k_tile, int slot) {
    if (!from.has_row) return;
    ptx::bulk_copy(storage_.stages[slot].x[lane_], from.x + k_tile * kTile,
                   row_bytes(tiles_from(k_tile)), &storage_.full[slot]);
  }

  __device__ __forceinline__ void wait_empty() {
    ptx::mbarrier_wait(&storage_.empty[at_.slot], at_.parity ^ 1);
  }

  // Lane 0 writes all of it, as it is its arrival that says so.
  __device__ __forceinline__ void describe(const Piece& piece) {
    auto& stage = storage_.stages[at_.slot];
    if (lane_ == 0) {
      stage.expert = piece.expert;
      stage.column_block = piece.column_block;
    }
#pragma unroll
    for (int i = 0; i < kStreamRows; ++i) {
      const int row = __shfl_sync(0xffffffffu, piece.row, i);
      if (lane_ == 0) stage.out_row[i] = row;
    }
  }

  const GemmParams& p_;
  Storage& storage_;
  const int lane_;
  bool x_is_pending_;
  RingPosition<Storage::kStages> at_;
};

}  // namespace jax_marlin
