// Operand B: rows of x, and beside them scales and zero points, in a ring of shared-memory stages.
//
// A stage holds, for each warp of K, `kChunk` packed K tiles. Everything is requested with cp.async
// before the first weight, because a request issued after megabytes of weights waits behind them.
// Where the stages hold all of K they are filled once: warps then meet at one barrier and no more.
#pragma once

#include <type_traits>

#include "transposed_scales.cuh"

namespace jax_marlin {

template <class Config>
class ActivationRing {
  using Element = typename Config::Element;
  using Scales =
      std::conditional_t<Config::kTransposed, TransposedScales<Config>, StagedScales<Config>>;
  static constexpr int kVector = 8;  // 16-bit elements of one 16-byte copy
  // Copies of a stage: of x, thread by thread along a row; of scales, at most one a thread.
  static constexpr int kRowVectors = Config::kChunk * kTile / kVector;
  static constexpr int kRowsAtOnce = Config::kThreads / kRowVectors;
  static constexpr int kScaleCopies = Config::kWarpsK * kStageScaleVectors<Config>;
  static_assert(kScaleCopies <= Config::kThreads, "a thread copies one vector of scales a stage");

 public:
  __device__ __forceinline__ ActivationRing(const GemmParams& p, const WorkTile& tile,
                                            int tiles_per_warp, SharedStorage<Config>& storage)
      : p_(p),
        tile_(tile),
        tiles_per_warp_(tiles_per_warp),
        storage_(storage),
        scales_(p, tile, share(scale_warp() % Config::kWarpsK).expert) {}

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

  // As the scales' own `load`.
  __device__ __forceinline__ auto load_scale(int f, int slot, int half) const {
    return Scales::load(storage_.stages, read_stage_, f, slot, half);
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

  // The warp of K whose scales this thread copies.
  static __device__ __forceinline__ int scale_warp() {
    return threadIdx.x / kStageScaleVectors<Config>;
  }

  __device__ __forceinline__ void request_scales() {
    const int warp_k = scale_warp();
    scales_.request(storage_.stages, request_stage_, warp_k, first_k_tile(warp_k),
                    k_tile_end(warp_k));
  }

  const GemmParams& p_;
  const WorkTile& tile_;
  const int tiles_per_warp_;
  SharedStorage<Config>& storage_;
  const Scales scales_;
  int request_chunk_ = 0, request_stage_ = 0;
  int read_stage_ = Config::kStages - 1;
};

}  // namespace jax_marlin
