// The wgmma kernel's single template argument, every constant that follows, and its shared memory.
#pragma once

#include "ring_position.cuh"
#include "weight_format.cuh"
#include "wgmma_tile.h"

namespace jax_marlin {

constexpr int kWarpgroup = 128;
constexpr int kProducerBarrier = 1;  // named barriers; 0 is __syncthreads
constexpr int kStaggerBarrier = 2;
constexpr int kGroupBarrier = 3;     // + warpgroup
constexpr int kWorkSlots = 2;       // pieces of work whose description is in shared memory
constexpr int kRowPadding = 16;     // bytes: 8 rows of a matrix lie in different banks

template <class Element_, int bits, ZeroPoints zero_points, WgmmaTile tile>
struct WgmmaConfig : WeightFormat<Element_, bits, zero_points> {
  static constexpr int kTileM = tile.tile_m;
  static constexpr int kGroups = tile.groups;
  static constexpr int kGroupTiles = tile.group_tiles;
  static constexpr int kCopyThreads = kWarpgroup * tile.copy_groups;
  static constexpr int kColumnTiles = tile.column_tiles();
  static constexpr int kColumns = tile.columns();
  static constexpr int kGroupColumns = kTile * kGroupTiles;
  static constexpr bool kInBoxes = tile.in_boxes;
  static constexpr bool kCanGate = tile.can_gate();
  static constexpr bool kHalfTiles = kCanGate && kGroupTiles == 1;  // of gate and of up
  static constexpr int kStageTiles = tile.stage_tiles_of(bits);
  static constexpr int kBatch = tile.batch;
  static constexpr int kThreads = tile.threads();
  static constexpr int kMinBlocks = tile.min_blocks;
  static constexpr bool kScaleSums = false;  // weights are scaled while they are dequantized

  static constexpr int kWidthStep = tile.width_step();
  static constexpr int kWidths = kTileM / kWidthStep;

  // Rows whose sums are in shared memory at once, to be transposed and, split K, exchanged.
  static constexpr int kUsualChunk = 64 / kGroupTiles;
  static constexpr int kChunk = kTileM < kUsualChunk        ? kTileM
                                : kTileM % kUsualChunk == 0 ? kUsualChunk
                                                            : kWidthStep;
  // 4 floats of padding spread the accumulators' (token 2c, column g) over all 32 banks.
  static constexpr int kSumPitch = kGroupColumns + 4;
  // Or two slots of rows on their way out, the narrow ones: wgmma_row_store.cuh.
  static constexpr int kSlotBytes = kChunk * (kGroupColumns * 2 + kRowPadding);

  // Two warpgroups alone on an SM start some stages apart, and stay so: while one stores its sums,
  // the other has the tensor cores to itself.
  static constexpr bool kStaggered = kGroups == 2 && kMinBlocks == 1;

  // Registers of a thread: all start with an equal share of 64 Ki, multiples of 8.
  static constexpr int kEqualRegisters = 65536 / (kThreads * kMinBlocks) / 8 * 8;
  static constexpr int kSumRegisters = kGroupTiles * kTileM / 2;
  // The compiler gives the operands of each loop registers of their own: whether there are enough
  // for a loop of each width, found by looking for spills.
  static constexpr int kLoopRegisters = kSumRegisters + kWidths * 8 * kBatch * kGroupTiles;
  static constexpr bool kFewOperands =
      kGroupTiles == 1 && bits == 4 && zero_points == ZeroPoints::kSymmetric;
  static constexpr bool kHasRegisters =
      kLoopRegisters <= 192 && (kSumRegisters < 128 || kFewOperands);
  static constexpr int kCopyRegisters = kGroups + tile.copy_groups > 3 || kMinBlocks > 1 ? 32
                                        : kSumRegisters > 128                            ? 40
                                                                                         : 56;
  static constexpr int kMultiplyRegisters =
      ((kGroups + tile.copy_groups) * kEqualRegisters - tile.copy_groups * kCopyRegisters) /
      kGroups / 8 * 8;

  static_assert((kStageTiles & (kStageTiles - 1)) == 0, "scales of a stage: halves_of_scales");
  static_assert(kTileM % kWidthStep == 0 && kTileM % kChunk == 0, "rows divide into widths");
  static_assert(4 % kBatch == 0 && 4 * kStageTiles / kBatch % 2 == 0,
                "two sets of fragments take turns, the same way in every stage");
};

template <class Config>
struct WgmmaStorage {
  using Element = typename Config::Element;
  static constexpr int kHalves = 2 * Config::kStageTiles;  // scales may change every 32 of K
  static constexpr int kScaleSets = Config::kStoredZeroPoints ? 2 : 1;

  struct alignas(1024) Stage {
    Element x[Config::kStageTiles][Config::kTileM][kTile];  // swizzled: ptx_wgmma.cuh
    alignas(16) uint32_t weights[Config::kColumnTiles][Config::kStageTiles][Config::kWordsPerTile];
    alignas(16) Element scales[kScaleSets][kHalves][Config::kColumns];  // then zero points
  };

  // A piece of work, written by the warpgroup that copies.
  struct Work {
    int expert;  // -1: no more work
    int column_block;
    int rows;  // rows of the tile up to its last one that is no padding
    int out_row[Config::kTileM];  // -1 for padding
    alignas(8) float weight[Config::kTileM];  // of the router, or 1
  };

  // On their way from a warpgroup's registers to memory: one or the other for a whole launch.
  union alignas(16) Rows {
    float sums[Config::kChunk][Config::kSumPitch];
    unsigned char slots[2][Config::kSlotBytes];
  };

  struct Rest {
    Rows rows[Config::kGroups];
    Work work[kWorkSlots];
    int warp_rows[kWorkSlots][Config::kCopyThreads / 32];
    uint64_t work_full[kWorkSlots], work_empty[kWorkSlots];
    uint64_t parts_ready[Config::kGroups], parts_read[Config::kGroups];  // split K, of the cluster
  };

  static constexpr int kBudget =
      kSharedOfSm / Config::kMinBlocks - kSharedReserve - static_cast<int>(sizeof(Rest)) - 128;
  static constexpr int kStages = kBudget / (static_cast<int>(sizeof(Stage)) + 16) < 16
                                     ? kBudget / (static_cast<int>(sizeof(Stage)) + 16)
                                     : 16;
  static_assert(kStages >= 3, "copies run ahead of the products");
  static constexpr int kLead = kStages - 2;  // of a staggered warpgroup: the ring holds no more

  Stage stages[kStages];
  Rest rest;
  uint64_t full[kStages], empty[kStages];
};

// Whether the two halves of a packed K tile can have different scales.
template <class Params>
__device__ __forceinline__ bool scales_change_inside(const Params& p) {
  return p.group_size % kTile != 0;
}

// Halves of a stage's K tiles that share scales, a power of two: a group's, if no stage begins
// inside one.
template <class Config, class Params>
__device__ __forceinline__ int halves_of_scales(const Params& p) {
  if (scales_change_inside(p)) return 1;
  const bool by_stage = p.group_size % (kTile * Config::kStageTiles) == 0 && p.split_k == 1;
  return by_stage ? 2 * Config::kStageTiles : 2;
}

// Packed K tiles of this block: all, or its part when the blocks of a cluster split K.
struct KRange {
  int begin, end;
};
template <class Params>
__device__ __forceinline__ KRange k_range(const Params& p) {
  const int per_part = (p.k_tiles + p.split_k - 1) / p.split_k;
  const int begin = min(static_cast<int>(blockIdx.x) % p.split_k * per_part, p.k_tiles);
  return {begin, min(begin + per_part, p.k_tiles)};
}

}  // namespace jax_marlin
