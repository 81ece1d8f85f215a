// Operand B: rows of x, and beside them scales and zero points, in a ring of shared-memory stages.
//
// A stage holds, for each warp of K, `kChunk` packed K tiles. Everything is requested with cp.async
// before the first weight, because a request issued after megabytes of weights waits behind them.
#pragma once

#include "dequant.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"

namespace jax_marlin {

template <class Config>
class ActivationRing {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;
  static constexpr int kVector = 8;  // 16-bit elements of one 16-byte copy

 public:
  __device__ __forceinline__ ActivationRing(const GemmParams& p, const WorkTile& tile,
                                            int tiles_per_warp, SharedStorage<Config>& storage)
      : p_(p), tile_(tile), tiles_per_warp_(tiles_per_warp), storage_(storage) {}

  // Fills the ring but for the stage that `advance` requests first.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int stage = 0; stage < Config::kStages - 1; ++stage) request();
  }

  // The next stage becomes readable; the stage read before it is refilled.
  __device__ __forceinline__ void advance() {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
    request();
    read_stage_ = read_stage_ + 1 == Config::kStages ? 0 : read_stage_ + 1;
  }

  // B fragments of 32 of K (two k16 steps) for 8 tokens: b[2 * step], b[2 * step + 1].
  __device__ __forceinline__ void load_fragment(uint32_t (&b)[4], int warp_k, int m, int j,
                                                int half) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(b, &storage_.stages.x[read_stage_][warp_k][8 * m + lane % 8]
                                          [j * kTile + half * kHalf + lane / 8 * 8]);
  }

  // Scales of rows n = first + g and first + g + 8, where `first` is a multiple of 16.
  __device__ __forceinline__ GroupScale<Config> load_scale(int warp_k, int first, int j,
                                                           int half) const {
    // Column 16w + 8b + g of a tile is stored at 16w + 2g + b: the two rows are neighbours.
    const int at = first + 2 * (threadIdx.x % 32 / 4);
    const auto& stages = storage_.stages;
    const Pair scales =
        *reinterpret_cast<const Pair*>(&stages.scales[read_stage_][warp_k][2 * j + half][at]);
    if constexpr (Config::kStoredZeroPoints) {
      return {scales, *reinterpret_cast<const Pair*>(
                          &stages.zero_points[read_stage_][warp_k][2 * j + half][at])};
    } else {
      return {scales, Config::twice(Config::from_float(Config::kSymmetricZeroPoint))};
    }
  }

 private:
  // One commit group a call, also when nothing is left, so that waits count stages.
  __device__ __forceinline__ void request() {
    if (request_chunk_ * Config::kChunk < tiles_per_warp_) {
      request_x();
      request_columns(storage_.stages.scales[request_stage_], p_.scales);
      if constexpr (Config::kStoredZeroPoints) {
        request_columns(storage_.stages.zero_points[request_stage_], p_.zero_points);
      }
    }
    ptx::cp_async_commit();
    ++request_chunk_;
    request_stage_ = request_stage_ + 1 == Config::kStages ? 0 : request_stage_ + 1;
  }

  // First packed K tile of this stage for a warp of K, counted in the whole problem.
  __device__ __forceinline__ int first_k_tile(int warp_k) const {
    return tile_.k_tile_begin + warp_k * tiles_per_warp_ + request_chunk_ * Config::kChunk;
  }

  // End of what a warp of K multiplies: its own share, within this block's part.
  __device__ __forceinline__ int k_tile_end(int warp_k) const {
    return min(tile_.k_tile_begin + (warp_k + 1) * tiles_per_warp_, tile_.k_tile_end);
  }

  __device__ __forceinline__ void request_x() {
    constexpr int kRowVectors = Config::kChunk * kTile / kVector;
    constexpr int kCopies = Config::kWarpsK * Config::kTileM * kRowVectors;
    // NOTE: unrolled, the addresses of all copies stay live through the main loop and spill.
#pragma unroll 1
    for (int i = threadIdx.x; i < kCopies; i += kThreads) {
      const int vector = i % kRowVectors, row = i / kRowVectors % Config::kTileM;
      const int warp_k = i / (kRowVectors * Config::kTileM);
      const int k = first_k_tile(warp_k) * kTile + vector * kVector;
      const int k_end = min(k_tile_end(warp_k) * kTile, p_.k);
      const int source = storage_.source_row[row];
      const int valid = source < 0 ? 0 : min(max(k_end - k, 0), kVector);
      const Element* x = static_cast<const Element*>(p_.x);
      // A copy of 0 bytes writes zeros but still wants an address inside the array.
      const Element* from = valid == 0 ? x : x + source * p_.x_stride + k;
      ptx::cp_async(&storage_.stages.x[request_stage_][warp_k][row][vector * kVector], from,
                    valid * static_cast<int>(sizeof(Element)));
    }
  }

  // to: [kWarpsK, 2 * kChunk, kColumns]; from: [num_experts, stack_n_tiles, num_groups, 64]
  __device__ __forceinline__ void request_columns(
      Element (&to)[Config::kWarpsK][2 * Config::kChunk][Config::kColumns], const void* from) {
    constexpr int kRowVectors = Config::kColumns / kVector, kHalves = 2 * Config::kChunk;
#pragma unroll 1
    for (int i = threadIdx.x; i < Config::kWarpsK * kHalves * kRowVectors; i += kThreads) {
      const int vector = i % kRowVectors, half = i / kRowVectors % kHalves;
      const int warp_k = i / (kRowVectors * kHalves);
      const int k_tile = first_k_tile(warp_k) + half / 2;
      const int group = (k_tile * kTile + half % 2 * kHalf) / p_.group_size;
      const int n_tile =
          min(tile_.column_block * Config::kNTiles + vector / 8, (p_.n + kTile - 1) / kTile - 1);
      const int64_t column_tile =
          static_cast<int64_t>(tile_.expert) * p_.stack_n_tiles + p_.first_tile + n_tile;
      const bool valid = k_tile < k_tile_end(warp_k) && group < p_.num_groups;
      const Element* source = static_cast<const Element*>(from);
      if (valid) source += (column_tile * p_.num_groups + group) * kTile + vector % 8 * kVector;
      ptx::cp_async(&to[warp_k][half][vector * kVector], source, valid ? 16 : 0);
    }
  }

  const GemmParams& p_;
  const WorkTile& tile_;
  const int tiles_per_warp_;
  SharedStorage<Config>& storage_;
  int request_chunk_ = 0, request_stage_ = 0;
  int read_stage_ = Config::kStages - 1;
};

}  // namespace jax_marlin
