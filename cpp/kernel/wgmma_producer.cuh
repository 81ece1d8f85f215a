// The warpgroup that copies: rows of x, packed weights, scales and zero points into a ring of
// stages, as far ahead of the products as the ring is long, across pieces of work.
#pragma once

#include "ptx_sm90.cuh"
#include "wgmma_scheduler.cuh"

namespace jax_marlin {

template <class Config>
class Producer {
  using Element = typename Config::Element;
  using Storage = WgmmaStorage<Config>;
  static constexpr int kVector = 8;               // 16-bit elements of one 16-byte copy
  static constexpr int kRowStep = kWarpgroup / 8;  // 8 threads copy 64 of K of a row
  static constexpr int kRows = Config::kTileM / kRowStep;

 public:
  __device__ __forceinline__ Producer(const GemmParams& p, Storage& storage)
      : p_(p), storage_(storage), thread_(threadIdx.x % kWarpgroup) {}

  __device__ __forceinline__ void run() {
    const WorkOrder<Config> order(p_);
    const KRange k = k_range(p_);
    const int clusters = gridDim.x / p_.split_k;
    for (int index = blockIdx.x / p_.split_k; index < order.count(); index += clusters) {
      int row_block;
      order.seek(index, row_block, column_block_);
      expert_ = block_expert(p_, row_block);
      if (expert_ < 0) continue;
      const int rows = find_rows(row_block);
      if (rows == 0) continue;
      publish(expert_, rows);
      if (p_.row_divisor != 1) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) row_[i] = row_[i] < 0 ? -1 : row_[i] / p_.row_divisor;
      }
      for (int k_tile = k.begin; k_tile < k.end; k_tile += Config::kStageTiles) {
        ptx::mbarrier_wait(&storage_.empty[at_.slot], at_.parity ^ 1);
        copy_x(k_tile, k.end, rows);
        copy_columns(storage_.stages[at_.slot].scales, p_.scales, k_tile, k.end);
        if constexpr (Config::kStoredZeroPoints) {
          copy_columns(storage_.stages[at_.slot].zero_points, p_.zero_points, k_tile, k.end);
        }
        if (thread_ == 0) copy_weights(k_tile, min(k.end - k_tile, Config::kStageTiles));
        ptx::mbarrier_arrive_after_copies(&storage_.full[at_.slot]);
        at_.advance();
      }
    }
    publish(-1, 0);
  }

 private:
  // This thread's rows of out; how many rows lie up to the tile's last used one, for all threads.
  __device__ __forceinline__ int find_rows(int row_block) {
    int last = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = thread_ / 8 + kRowStep * i;
      row_[i] = block_row<Config>(p_, row_block, row);
      if (row_[i] >= 0) last = row + 1;
    }
    last = __reduce_max_sync(0xffffffffu, last);
    int(&warp_rows)[4] = storage_.rest.warp_rows[finds_++ % kWorkSlots];
    if (thread_ % 32 == 0) warp_rows[thread_ / 32] = last;
    ptx::named_barrier(1, kWarpgroup);
    return max(max(warp_rows[0], warp_rows[1]), max(warp_rows[2], warp_rows[3]));
  }

  __device__ __forceinline__ void publish(int expert, int rows) {
    ptx::mbarrier_wait(&storage_.rest.work_empty[work_at_.slot], work_at_.parity ^ 1);
    auto& work = storage_.rest.work[work_at_.slot];
    if (thread_ == 0) {
      work.expert = expert;
      work.column_block = column_block_;
      work.rows = rows;
    }
    if (expert >= 0 && thread_ % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) work.out_row[thread_ / 8 + kRowStep * i] = row_[i];
    }
    ptx::mbarrier_arrive(&storage_.rest.work_full[work_at_.slot]);
    work_at_.advance();
  }

  // Padding rows and columns past the end are zero.
  __device__ __forceinline__ void copy_x(int k_tile, int k_tile_end, int rows) {
    const int vector = thread_ % 8, row = thread_ / 8;
    const int k_end = min(k_tile_end * kTile, p_.k);
    const Element* x = static_cast<const Element*>(p_.x);
#pragma unroll
    for (int t = 0; t < Config::kStageTiles; ++t) {
      const int k = (k_tile + t) * kTile + vector * kVector;
      const int valid = min(max(k_end - k, 0), kVector) * static_cast<int>(sizeof(Element));
      Element* to = &storage_.stages[at_.slot].x[t][row][(vector ^ row % 8) * kVector];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i * kRowStep >= rows) break;
        const bool used = row_[i] >= 0 && valid > 0;
        // A copy of 0 bytes writes zeros but still wants an address inside the array.
        const int64_t source = used ? row_[i] * p_.x_stride + k : 0;
        ptx::cp_async(to + i * kRowStep * kTile, x + source, used ? valid : 0);
      }
    }
  }

  // Column tiles past the end repeat the last one; the epilogue does not store them.
  __device__ __forceinline__ int64_t stack_tile(int column_tile) const {
    const int last_tile = (p_.n + kTile - 1) / kTile - 1;
    const int n_tile = min(column_block_ * Config::kColumnTiles + column_tile, last_tile);
    return static_cast<int64_t>(expert_) * p_.stack_n_tiles + p_.first_tile + n_tile;
  }

  // from: [num_experts, stack_n_tiles, num_groups, 64]
  __device__ __forceinline__ void copy_columns(Element (&to)[Storage::kHalves][Config::kColumns],
                                               const void* from, int k_tile, int k_tile_end) {
    constexpr int kRowVectors = Config::kColumns / kVector;
#pragma unroll 1
    for (int i = thread_; i < Storage::kHalves * kRowVectors; i += kWarpgroup) {
      const int half = i / kRowVectors, vector = i % kRowVectors;
      const int group = (k_tile * kTile + half * kHalf) / p_.group_size;
      const bool valid = k_tile + half / 2 < k_tile_end && group < p_.num_groups;
      const Element* source = static_cast<const Element*>(from);
      if (valid) {
        source += (stack_tile(vector / 8) * p_.num_groups + group) * kTile + vector % 8 * kVector;
      }
      ptx::cp_async(&to[half][vector * kVector], source, valid ? 16 : 0);
    }
  }

  // K tiles missing in the last stage keep old codes: their scales are zero, so they add nothing.
  __device__ __forceinline__ void copy_weights(int k_tile, int k_tiles) {
    constexpr int kTileBytes = Config::kWordsPerTile * 4;
    auto& stage = storage_.stages[at_.slot];
    uint64_t* full = &storage_.full[at_.slot];
    ptx::mbarrier_arrive_expect(full, Config::kColumnTiles * k_tiles * kTileBytes);
#pragma unroll 1
    for (int tile = 0; tile < Config::kColumnTiles; ++tile) {
      const int64_t from = (stack_tile(tile) * p_.k_tiles + k_tile) * Config::kWordsPerTile;
      ptx::bulk_copy(stage.weights[tile], p_.qweight + from, k_tiles * kTileBytes, full);
    }
  }

  const GemmParams& p_;
  Storage& storage_;
  const int thread_;
  RingPosition<Storage::kStages> at_;
  RingPosition<kWorkSlots> work_at_;
  int expert_ = 0, column_block_ = 0, finds_ = 0;
  int row_[kRows];  // of out when published, then of x; -1 for padding
};

}  // namespace jax_marlin
