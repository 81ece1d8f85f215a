// Operand B: rows of x, and beside them scales and zero points, in a ring of shared-memory stages.
//
// A stage holds, for each warp of K, `kChunk` packed K tiles. Everything is requested with cp.async
// before the first weight, because a request issued after megabytes of weights waits behind them.
// Where the stages hold all of K they are filled once: warps then meet at one barrier and no more.
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
  static constexpr int kHalves = 2 * Config::kChunk;
  // Copies of a stage: of x, thread by thread along a row; of scales, at most one a thread.
  static constexpr int kRowVectors = Config::kChunk * kTile / kVector;
  static constexpr int kRowsAtOnce = Config::kThreads / kRowVectors;
  static constexpr int kScaleVectors = Config::kColumns / kVector;
  static constexpr int kScaleCopies = Config::kWarpsK * kHalves * kScaleVectors;
  static_assert(kScaleCopies <= Config::kThreads, "a thread copies one vector of scales a stage");

 public:
  __device__ __forceinline__ ActivationRing(const GemmParams& p, const WorkTile& tile,
                                            int tiles_per_warp, SharedStorage<Config>& storage)
      : p_(p), tile_(tile), tiles_per_warp_(tiles_per_warp), storage_(storage) {
    const int vector = threadIdx.x % kScaleVectors;
    const int fragment = stack_fragment<Config>(p, tile, vector / 2);
    const int warp_k = threadIdx.x / (kScaleVectors * kHalves) % Config::kWarpsK;
    const int64_t column_tile =
        static_cast<int64_t>(share(warp_k).expert) * p.stack_n_tiles + fragment / 4;
    scale_offset_ =
        column_tile * p.num_groups * kTile + fragment % 4 * kFragment + vector % 2 * kVector;
  }

  static __device__ __forceinline__ void init(SharedStorage<Config>&) {}

  // Fills the ring; but for the stage that `advance` requests first, where the ring turns.
  __device__ __forceinline__ void start() { start(true, true); }
  // The same in two steps: scales are inputs, x may still be being written.
  __device__ __forceinline__ void start_scales() { start(false, true); }
  __device__ __forceinline__ void start_x() { start(true, false); }

  // Packed K tiles that a warp multiplies: as many as any, since warps meet at each stage.
  __device__ __forceinline__ int tiles_of(const WarpShare&) const { return tiles_per_warp_; }

  // The next stage becomes readable; the stage read before it is refilled.
  __device__ __forceinline__ void advance() {
    if (!is_whole()) {
      ptx::cp_async_wait<Config::kStages - 2>();
      __syncthreads();
      request(true, true);
    } else if (read_stage_ == Config::kStages - 1) {  // the first time
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    read_stage_ = read_stage_ + 1 == Config::kStages ? 0 : read_stage_ + 1;
  }

  // B fragments of 32 of K (two k16 steps) for 8 tokens: b[2 * step], b[2 * step + 1].
  __device__ __forceinline__ void load_fragment(uint32_t (&b)[4], int m, int slot, int half) const {
    const int warp_k = threadIdx.x / 32 / Config::kWarpsN, j = slot % Config::kChunk;
    const int lane = threadIdx.x % 32;
    // One row of x stands for 8 equal tokens.
    const int row = Config::kSumsRoutes ? 0 : 8 * m + lane % 8;
    ptx::ldmatrix_x4(
        b,
        ptx::shared_address(
            &storage_.stages.x[read_stage_][warp_k][row][j * kTile + half * kHalf + lane / 8 * 8]));
  }

  // Scales of rows n = g and g + 8 of a warp's fragment f.
  __device__ __forceinline__ GroupScale<Config> load_scale(int f, int slot, int half) const {
    const int j = slot % Config::kChunk;
    const int warp_n = threadIdx.x / 32 % Config::kWarpsN;
    const int warp_k = threadIdx.x / 32 / Config::kWarpsN;
    // Column 16w + 8b + g of a tile is stored at 16w + 2g + b: the two rows are neighbours.
    const int at = kFragment * (warp_n * Config::kFragsN + f) + 2 * (threadIdx.x % 32 / 4);
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

  __device__ __forceinline__ void end_scale(int) {}

 private:
  __device__ __forceinline__ bool is_whole() const {
    return tiles_per_warp_ <= Config::kStages * Config::kChunk;
  }

  __device__ __forceinline__ void start(bool of_x, bool of_scales) {
    int stages = is_whole() ? Config::kStages : Config::kStages - 1;
    if constexpr (Config::kSumsRoutes) {  // its ring is longer than most K
      stages = min(stages, (tiles_per_warp_ + Config::kChunk - 1) / Config::kChunk);
    }
    request_chunk_ = request_stage_ = 0;
#pragma unroll 1  // code that runs once is fetched once
    for (int stage = 0; stage < stages; ++stage) request(of_x, of_scales);
  }

  // One commit group a call, also when nothing is left, so that waits count stages.
  __device__ __forceinline__ void request(bool of_x, bool of_scales) {
    if (request_chunk_ * Config::kChunk < tiles_per_warp_) {
      if (of_x) request_x();
      const bool has_copy = kScaleCopies == Config::kThreads || threadIdx.x < kScaleCopies;
      if (of_scales && has_copy) request_scales();
    }
    ptx::cp_async_commit();
    ++request_chunk_;
    request_stage_ = request_stage_ + 1 == Config::kStages ? 0 : request_stage_ + 1;
  }

  __device__ __forceinline__ WarpShare share(int warp_k) const {
    return share_of<Config>(p_, tile_, tiles_per_warp_, warp_k, storage_);
  }

  // First packed K tile of this stage for a warp of K, counted in the whole problem.
  __device__ __forceinline__ int first_k_tile(int warp_k) const {
    const int begin =
        Config::kSumsRoutes ? share(warp_k).begin : tile_.k_tile_begin + warp_k * tiles_per_warp_;
    return begin + request_chunk_ * Config::kChunk;
  }

  // End of what a warp of K multiplies: its own share, within this block's part.
  __device__ __forceinline__ int k_tile_end(int warp_k) const {
    if constexpr (Config::kSumsRoutes) return share(warp_k).end;
    return min(tile_.k_tile_begin + (warp_k + 1) * tiles_per_warp_, tile_.k_tile_end);
  }

  // One vector of this stage's x for a warp of K; what lies past its share is zero.
  __device__ __forceinline__ void request_vector(const Element* x, bool used, int warp_k, int row,
                                                 int vector) {
    const int k = first_k_tile(warp_k) * kTile + vector * kVector;
    const int k_end = used ? min(k_tile_end(warp_k) * kTile, p_.k) : 0;
    // A copy of 0 bytes writes zeros but still wants an address inside the array.
    const int valid = min(max(k_end - k, 0), kVector);
    ptx::cp_async(&storage_.stages.x[request_stage_][warp_k][row][vector * kVector],
                  x + (valid == 0 ? 0 : k), valid * static_cast<int>(sizeof(Element)));
  }

  // Each warp of K has a row of its own: that of its route.
  __device__ __forceinline__ void request_routes() {
    static_assert(!Config::kSumsRoutes || kRowsAtOnce >= Config::kWarpsK, "a vector a thread");
    const int vector = threadIdx.x % kRowVectors, warp_k = threadIdx.x / kRowVectors;
    if (warp_k >= Config::kWarpsK) return;
    const int route = min(warp_k >> p_.route_shift, p_.routes_of_row - 1);
    const int64_t row = int64_t{storage_.out_row[0]} * p_.routes_of_row + route;
    request_vector(static_cast<const Element*>(p_.x) + row * p_.x_stride, true, warp_k, 0, vector);
  }

  __device__ __forceinline__ void request_x() {
    if constexpr (Config::kSumsRoutes) return request_routes();
    const int vector = threadIdx.x % kRowVectors, first_row = threadIdx.x / kRowVectors;
    // NOTE: unrolled, the addresses of all copies stay live through the main loop and spill.
#pragma unroll 1
    for (int row = first_row; row < Config::kTileM; row += kRowsAtOnce) {
      const int source = storage_.source_row[row];
      const Element* x = static_cast<const Element*>(p_.x) + max(source, 0) * p_.x_stride;
#pragma unroll 4
      for (int warp_k = 0; warp_k < Config::kWarpsK; ++warp_k) {
        request_vector(x, source >= 0, warp_k, row, vector);
      }
    }
  }

  // One vector, 8 columns, of the scales (and zero points) of one half tile.
  __device__ __forceinline__ void request_scales() {
    const int vector = threadIdx.x % kScaleVectors, half = threadIdx.x / kScaleVectors % kHalves;
    const int warp_k = threadIdx.x / (kScaleVectors * kHalves);
    const int k_tile = first_k_tile(warp_k) + half / 2;
    // floor(i * kHalf / group_size) for half tile i < 2^21: the quotient plus half a step is
    // further from an integer than float32 rounds. The last half of K may begin a group too many.
    const int quotient = static_cast<int>((2 * k_tile + half % 2 + 0.5f) * p_.groups_per_half);
    const int group = min(quotient, p_.num_groups - 1);
    const bool valid = k_tile < k_tile_end(warp_k);
    const int64_t at = valid ? scale_offset_ + group * kTile : 0;
    auto& stages = storage_.stages;
    ptx::cp_async(&stages.scales[request_stage_][warp_k][half][vector * kVector],
                  static_cast<const Element*>(p_.scales) + at, valid ? 16 : 0);
    if constexpr (Config::kStoredZeroPoints) {
      ptx::cp_async(&stages.zero_points[request_stage_][warp_k][half][vector * kVector],
                    static_cast<const Element*>(p_.zero_points) + at, valid ? 16 : 0);
    }
  }

  const GemmParams& p_;
  const WorkTile& tile_;
  const int tiles_per_warp_;
  SharedStorage<Config>& storage_;
  int64_t scale_offset_;  // in scales, of this thread's vector in the expert's first group
  int request_chunk_ = 0, request_stage_ = 0;
  int read_stage_ = Config::kStages - 1;
};

}  // namespace jax_marlin
