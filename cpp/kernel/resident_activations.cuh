// Operand B where shared memory holds all of it: rows of x over a block's whole part of K, and the
// scales and zero points of its columns, each run of memory brought by one bulk copy.
//
// The loop over K then copies nothing and meets at no barrier: with few tokens on a GPU of sm_90
// instructions are scarcer than memory. ActivationRing serves whatever does not fit.
#pragma once

#include "dequant.cuh"
#include "ptx_sm90.cuh"
#include "scheduler.cuh"

namespace jax_marlin {

template <class Config>
class ResidentActivations {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;
  static constexpr int kSets = Config::kStoredZeroPoints ? 2 : 1;  // scales, then zero points
  static constexpr int kPairs = Config::kFragments / 2;
  static_assert(Config::kFragments <= 4 * kResidentTiles, "a column tile has four fragments");

 public:
  // Before any thread uses the barrier, with a __syncthreads between.
  static __device__ __forceinline__ void init(SharedStorage<Config>& storage) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&storage.arrived, 2);  // x, scales
      ptx::fence_mbarrier_init();
    }
  }

  __device__ __forceinline__ ResidentActivations(const GemmParams& p, const WorkTile& tile,
                                                 int tiles_per_warp, SharedStorage<Config>& storage)
      : p_(p),
        tile_(tile),
        storage_(storage),
        tiles_(max(tile.k_tile_end - tile.k_tile_begin, 0)),
        pitch_(tiles_ * kTile + 8),
        x_(reinterpret_cast<Element*>(&storage.stages)),
        scales_(x_ + p.resident_rows * pitch_) {
    // A single group may have any size, others are multiples of 32.
    halves_of_group_ = p.num_groups == 1 ? 1 << 30 : p.group_size / kHalf;
    first_group_ = 2 * tile.k_tile_begin / halves_of_group_;
    const int last = max(2 * tile.k_tile_end - 1, 0) / halves_of_group_;
    groups_ = max(min(last, p.num_groups - 1) - first_group_ + 1, 0);

    const int lane = threadIdx.x % 32;
    const int warp_n = threadIdx.x / 32 % Config::kWarpsN;
    const int warp_k = threadIdx.x / 32 / Config::kWarpsN;
    const int k_tile = warp_k * tiles_per_warp;  // of this warp, in the block's part
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      const int row = min(8 * m + lane % 8, p.resident_rows - 1);
      x_at_[m] = ptx::shared_address(x_ + row * pitch_ + k_tile * kTile + lane / 8 * 8);
    }
    const int half = 2 * (tile.k_tile_begin + k_tile);
    const int group = half / halves_of_group_;
    halves_left_ = (group + 1) * halves_of_group_ - half;
    groups_left_ = p.num_groups - 1 - group;
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
      const int column = column_of(warp_n * Config::kFragsN + f) + 2 * (lane / 4);
      scale_at_[f] = scales_ + (group - first_group_) * kTile + column;
    }
  }

  __device__ __forceinline__ void start() {
    start_x();
    start_scales();
  }
  // Scales are inputs; x may still be being written.
  __device__ __forceinline__ void start_scales() {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x >= 32) return;
    // Two neighbours, one of gate and one of up, or one alone.
    const bool two = Config::kFragments > 4 || p_.activation != Activation::kNone;
    const int tiles = two ? kResidentTiles : 1,
              bytes = groups_ * kTile * static_cast<int>(sizeof(Element));
    if (lane == 0) ptx::mbarrier_arrive_expect(&storage_.arrived, kSets * tiles * bytes);
    __syncwarp();
    if (lane >= kSets * tiles || bytes == 0) return;
    const int slot = lane % tiles, set = lane / tiles;
    const int fragment = stack_fragment<Config>(p_, tile_, slot * kPairs);
    const int64_t column_tile =
        static_cast<int64_t>(tile_.expert) * p_.stack_n_tiles + fragment / 4;
    const auto* from = static_cast<const Element*>(set == 0 ? p_.scales : p_.zero_points);
    ptx::bulk_copy(scales_ + (set * kResidentTiles + slot) * groups_ * kTile,
                   from + (column_tile * p_.num_groups + first_group_) * kTile, bytes,
                   &storage_.arrived);
  }

  __device__ __forceinline__ void start_x() {
    const int k = tile_.k_tile_begin * kTile;
    const int used = min(tiles_ * kTile, p_.k - k);  // a multiple of 8
    if (used < tiles_ * kTile) clear_end(used);
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    // Rows that are padding keep what was there: only their own sums depend on it.
    const int source = lane < p_.resident_rows ? storage_.source_row[lane] : -1;
    const int rows = used <= 0 ? 0 : __popc(__ballot_sync(0xffffffffu, source >= 0));
    const int bytes = used * static_cast<int>(sizeof(Element));
    if (lane == 0) ptx::mbarrier_arrive_expect(&storage_.arrived, rows * bytes);
    __syncwarp();
    if (source < 0 || used <= 0) return;
    ptx::bulk_copy(x_ + lane * pitch_, static_cast<const Element*>(p_.x) + source * p_.x_stride + k,
                   bytes, &storage_.arrived);
  }

  // Packed K tiles that a warp multiplies.
  __device__ __forceinline__ int tiles_of(const WarpShare& share) const {
    return share.end - share.begin;
  }

  __device__ __forceinline__ void wait() { ptx::mbarrier_wait(&storage_.arrived, 0); }

  // The B fragments of ActivationRing, `slot` tiles behind this turn's first.
  __device__ __forceinline__ void load_fragment(uint32_t (&b)[4], int m, int slot, int half) const {
    ptx::ldmatrix_x4(b, x_at_[m] + (slot * kTile + half * kHalf) * 2);
  }

  __device__ __forceinline__ GroupScale<Config> load_scale(int f, int, int) const {
    const Pair scales = *reinterpret_cast<const Pair*>(scale_at_[f]);
    if constexpr (Config::kStoredZeroPoints) {
      return GroupScale<Config>(
          scales, *reinterpret_cast<const Pair*>(scale_at_[f] + kResidentTiles * groups_ * kTile));
    } else {
      return GroupScale<Config>(scales);
    }
  }

  // `halves` of K are done: perhaps a group.
  __device__ __forceinline__ void end_scale(int halves) {
    halves_left_ -= halves;
    if (halves_left_ > 0) return;
    halves_left_ = halves_of_group_;
    // The last half of K may lie behind the last group.
    if (halves == 1 && groups_left_-- <= 0) return;
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) scale_at_[f] += kTile;
  }

  // The ring of weights has turned.
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) x_at_[m] += Config::kDepth * kTile * 2;
  }

 private:
  // Place of a block's fragment among the scales of one group, in columns.
  __device__ __forceinline__ int column_of(int f) const {
    int slot = f / 4, first = f;
    if (p_.activation != Activation::kNone) {
      slot = f / kPairs;
      first = tile_.column_block * kPairs + f % kPairs;
    } else if (Config::kFragments < 4) {
      first = tile_.column_block * Config::kFragments + f;
    }
    return slot * groups_ * kTile + first % 4 * kFragment;
  }

  // What of the last tile lies past the end of K.
  __device__ __forceinline__ void clear_end(int used) {
    const int from = max(used, 0), count = tiles_ * kTile - from;
    for (int i = threadIdx.x; i < p_.resident_rows * count; i += Config::kThreads) {
      x_[i / count * pitch_ + from + i % count] = Config::from_float(0.f);
    }
    __syncthreads();
  }

  const GemmParams& p_;
  const WorkTile& tile_;
  SharedStorage<Config>& storage_;
  const int tiles_;  // packed K tiles of this block
  const int pitch_;  // of a row, in elements; 8 more than its K: ldmatrix then reads all banks
  Element* const x_;  // [resident_rows, pitch]
  Element* const scales_;  // [scales, zero points][column tile][group][64]
  uint32_t x_at_[Config::kFragsM];
  const Element* scale_at_[Config::kFragsN];
  int halves_of_group_, halves_left_, groups_left_;  // of the live group; groups after it
  int first_group_, groups_;  // of this block
};

}  // namespace jax_marlin
